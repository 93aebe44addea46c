"""Keeps normalised images within the range of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydistill._devices import to_device


@torch.no_grad()
def clamp_normalized_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Clip normalised images, in place and in one pass, to the range of pixels in [0, 1]: SRe2L's after every step.

    Equivalent to ``x[:, c].clamp_(-mean[c] / std[c], (1 - mean[c]) / std[c])`` for every channel c. Not recorded by
    autograd, so that an optimizer's leaf can be clipped as it is. NaN stays NaN.

    Args:
        x: ``[B, C, H, W]``, floating point, any strides; written to.
        mean, std: C numbers each, that the images were normalised by.

    Returns:
        x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: its shape or the lengths do not fit, or a std is not above zero.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, C, H, W], got {list(x.shape)}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != x.shape[1]:
            raise ValueError(f"{name}: expected {x.shape[1]} numbers, one for each channel, got {len(values)}")
    if not all(s > 0 for s in std):
        raise ValueError(f"std: expected numbers above zero, got {list(std)}")
    bounds = [[(value - m) / s for m, s in zip(mean, std, strict=True)] for value in (0.0, 1.0)]
    low, high = to_device(torch.tensor(bounds, dtype=x.dtype, device="cpu"), x.device).view(2, -1, 1, 1)
    return x.clamp_(low, high)
