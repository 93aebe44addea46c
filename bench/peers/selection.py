"""Greedy graph cut as in Dataset Quantization's code: the matrix of all similarities, sliced anew for every pick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Thunk = Callable[[], Tensor]


@dataclass(frozen=True)
class Samples:
    features: Tensor  # [n, d], of a last hidden layer: nonnegative, in clusters
    factors: Tensor | None  # [n, C], gradients of the loss in the logits
    picks: int

    def double(self) -> Samples:
        factors = None if self.factors is None else self.factors.double()
        return replace(self, features=self.features.double(), factors=factors)


def make_samples(config: dict[str, Any], with_factors: bool, dtype: torch.dtype = torch.float32) -> Samples:
    """Classes of equal size, as a network that has learnt them sees them."""
    generator = torch.Generator().manual_seed(0)
    n, d, classes = (config[name] for name in ("samples", "features", "classes"))
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    features = (centres[labels] + torch.randn(n, d, generator=generator)).relu()
    logits = 2 * features @ centres.T / d**0.5 + torch.randn(n, classes, generator=generator)
    factors = logits.softmax(1) - torch.nn.functional.one_hot(labels, classes)
    return Samples(features.to(dtype), factors.to(dtype) if with_factors else None, config["picks"])


def similarities(problem: Samples) -> np.ndarray:
    """[n, n]: 0.5 + 0.5 cosine, of gradients in full if there are factors."""
    rows = problem.features.numpy()
    if problem.factors is not None:
        b = problem.factors.numpy()
        rows = np.concatenate([b, (b[:, :, None] * rows[:, None, :]).reshape(len(b), -1)], 1)
    length = np.linalg.norm(rows, axis=1)
    found = rows @ rows.T
    found /= length[:, None] * length
    found *= 0.5
    found += 0.5
    return found


def loop(problem: Samples) -> Thunk:
    def run() -> Tensor:
        s = similarities(problem)
        n = len(s)
        of_all = s.sum(0)
        gains, selected, order = np.zeros(n), np.zeros(n, dtype=bool), []
        for _ in range(problem.picks):
            gains[~selected] = -2.0 * s[np.ix_(selected, ~selected)].sum(0) + of_all[~selected]
            pick = int(gains.argmax())
            selected[pick], gains[pick] = True, -np.inf
            order.append(pick)
        return torch.tensor(order)

    return run


def rows(problem: Samples) -> Thunk:
    """The same, with one row of the matrix subtracted for every pick."""

    def run() -> Tensor:
        s = similarities(problem)
        gains, order = s.sum(0), []
        for _ in range(problem.picks):
            order.append(int(gains.argmax()))
            gains -= 2 * s[order[-1]]
            gains[order[-1]] = -np.inf
        return torch.tensor(order)

    return run
