"""Definition of the attention maps of a ConvNet's features."""

from typing import Literal

from torch import Tensor


def attention_map(
    x: Tensor, p: float = 4.0, axis: Literal["spatial", "channel", "both"] = "spatial"
) -> Tensor | tuple[Tensor, Tensor]:
    """``x.abs().pow(p)`` summed over the channels, [N, H * W], and/or over the positions, [N, C]."""
    powers = x.abs().pow(p).flatten(2)
    maps = {"spatial": powers.sum(1), "channel": powers.sum(2)}
    return tuple(maps.values()) if axis == "both" else maps[axis]
