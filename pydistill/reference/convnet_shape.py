"""The shape of a distillation ConvNet and where its parameters lie in a flat vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

KERNEL = 3  # pixels a side of every convolution


class Layer(NamedTuple):
    """One block; height and width are those after its convolution, before its pool."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    padding: int


@dataclass(frozen=True)
class ConvNetShape:
    """Blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pool, then a linear classifier.

    Parameters lie in a flat vector in the order of `pydistill.nn.ConvNet`: per block the convolution's weight and bias
    and the norm's weight and bias, then the classifier's weight and bias.

    Raises:
        ValueError: a size below 1, or images too small for the depth.
    """

    channels: int
    height: int
    width_px: int  # of the input images [N, channels, height, width_px]
    widths: tuple[int, ...]  # output channels of each block
    first_padding: int  # of the first convolution; the others have 1
    classes: int
    eps: float = 1e-5  # added to the variance

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths: expected at least one block, got none")
        sizes = [("channels", self.channels), ("height", self.height), ("width_px", self.width_px)]
        sizes += [("classes", self.classes), *(("widths", width) for width in self.widths)]
        for name, size in sizes:
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.first_padding < 0:
            raise ValueError(f"first_padding: expected at least 0, got {self.first_padding}")
        if any(min(layer.height, layer.width) < 2 for layer in self.layers):
            raise ValueError(f"widths: {len(self.widths)} blocks leave nothing of {self.height}x{self.width_px} images")

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        found: list[Layer] = []
        channels, height, width = self.channels, self.height, self.width_px
        for block, out_channels in enumerate(self.widths):
            padding = 1 if block else self.first_padding
            height, width = (size + 2 * padding - KERNEL + 1 for size in (height, width))
            found.append(Layer(channels, out_channels, height, width, padding))
            channels, height, width = out_channels, height // 2, width // 2
        return tuple(found)

    @property
    def features(self) -> int:
        """What the classifier sees of an image."""
        last = self.layers[-1]
        return last.out_channels * (last.height // 2) * (last.width // 2)

    @cached_property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes: list[tuple[int, ...]] = []
        for layer in self.layers:
            channels = (layer.out_channels,)
            shapes += [(*channels, layer.in_channels, KERNEL, KERNEL), channels, channels, channels]
        return (*shapes, (self.classes, self.features), (self.classes,))

    @cached_property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes)

    def slices(self, theta: Tensor) -> list[Tensor]:
        """Views of theta ``[E, P]``, each parameter with E in front; raises ``ValueError`` for another shape."""
        if theta.dim() != 2 or theta.shape[1] != self.numel:
            raise ValueError(f"theta: expected shape [E, {self.numel}] for this net, got {list(theta.shape)}")
        parts = theta.split([math.prod(shape) for shape in self.parameter_shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.parameter_shapes, strict=True)]
