"""The cost of a storage format for labels: the error of the gradients that they give."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["GradientError"]

ROWS = 64  # measured per batch
_NEAR = 0.25  # deviation of a nearby student's logits, relative to the spread of the teacher's


class GradientError(NamedTuple):
    """Relative L2 error of the gradient of the loss (KL divergence, cross entropy) in a student's logits.

    ``|(q - p') - (q - p)| / |q - p|`` over rows, with the labels p as given, p' as stored and q of the student, all at
    the store's temperature. The smaller the gradient, the more of it a lossy format takes away.
    """

    fresh: float
    """Of an untrained student: its logits are zero."""
    near: float
    """Of one near the teacher: off by normal noise of a quarter of the standard deviation of a row's logits."""

    def __str__(self) -> str:
        return f"{_percent(self.fresh)} for a fresh student, {_percent(self.near)} for one near the teacher"


def measure(given: Tensor, kept: Tensor, logarithms: Tensor) -> GradientError:
    """The error to three digits, so that it is the same on every machine.

    Args:
        given, kept: float64 ``[n, C]`` distributions.
        logarithms: of ``given``, up to a constant per row.
    """
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(given.shape)))
    near = (logarithms + _NEAR * logarithms.std(1, correction=0, keepdim=True) * noise).softmax(1)
    lost = float((kept - given).norm())
    found = []
    for gradient in (float((1 / given.shape[1] - given).norm()), float((near - given).norm())):
        found.append(lost / gradient if gradient > 0 else (0.0 if lost == 0 else float("inf")))
    return GradientError(*(float(f"{value:.2e}") for value in found))


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"
