"""Normalised spaces of images, each a mean and a deviation per channel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["REPOSITORY_NORMALISATION", "renormalise"]

# The mean and deviation by which the method repositories (VICO-UoE/DatasetCondensation and its descendants) and
# DD-Ranking normalise: for CIFAR-10 the deviation is not that of its pixels, and so not that of `load`.
REPOSITORY_NORMALISATION = {
    "fashion-mnist": ((0.2861,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def renormalise(images: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """Converts normalised images from one mean and deviation to another; ``images`` itself if both are equal.

    Equivalent to ``(images * before_std + before_mean - after_mean) / after_std`` per channel.

    Args:
        images: ``[N, C, H, W]``.
        before, after: a mean and a deviation ``[C]`` each, of pixels in ``[0, 1]``.
    """
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return images
    # one factor and one shift, from float64: a round trip is then exact up to one rounding
    (mean, std), (new_mean, new_std) = ([each.double() for each in pair] for pair in (before, after))
    factor, shift = std / new_std, (mean - new_mean) / new_std
    return images * factor.to(images)[:, None, None] + shift.to(images)[:, None, None]
