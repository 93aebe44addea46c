"""Herding (Welling, ICML 2009; Rebuffi et al., iCaRL, CVPR 2017): samples whose mean is the mean of all."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill._arguments import check_whole
from pydistill.ops.graph_cut_greedy import check_rows

__all__ = ["herding"]


@torch.no_grad()
def herding(embeddings: Tensor, k: int, labels: Tensor | None = None) -> Tensor:
    """Picks samples one by one, each the one that brings the mean of the picks nearest to the mean of all.

    Equivalent to ``k`` times ``S.append(argmin_j |mean(x) - mean(x[S + [j]])|)`` over what is not in S, in float64;
    for equal distances the lowest index. A pick is one matrix-vector product, O(N d).

    Args:
        embeddings: floating ``[N, d]``.
        k: picks, or picks per class.
        labels: int64 ``[N]``, every class of 0..max in it; None: all samples are one class.

    Returns:
        int64 ``[k]`` in the order of the picks, or ``[K * k]``, classes in order.

    Raises:
        ValueError: k is not in 1..N, or more than a class has; labels or embeddings of a wrong shape or dtype, or
            embeddings that are not finite.
    """
    check_rows("embeddings", embeddings)
    check_whole("k", k)
    if labels is None:
        if not 1 <= k <= len(embeddings):
            raise ValueError(f"k: expected 1..N for {len(embeddings)} embeddings, got {k}")
        return _herd(embeddings.double(), k)
    return torch.cat([members[_herd(embeddings[members].double(), k)] for members in by_class(labels, embeddings, k)])


def by_class(labels: Tensor, samples: Tensor, k: int) -> list[Tensor]:
    """The indices of each class in 0..max; ValueError if one has fewer than ``k``."""
    if labels.dtype != torch.int64 or labels.shape != samples.shape[:1]:
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise ValueError(f"labels: expected int64 [{len(samples)}], got {got}")
    if k < 1:
        raise ValueError(f"k: expected at least 1 for each class, got {k}")
    if int(labels.amin()) < 0:
        raise ValueError(f"labels: expected classes from 0, got {int(labels.amin())}")
    found = [(labels == label).nonzero()[:, 0] for label in range(int(labels.max()) + 1)]
    for label, members in enumerate(found):
        if len(members) < k:
            raise ValueError(f"k: expected at most {len(members)}, the samples of class {label}, got {k}")
    return found


def _herd(x: Tensor, k: int) -> Tensor:
    mean, squares = x.mean(0), x.square().sum(1)
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    short = torch.zeros_like(mean)  # number of picks times the mean, minus the sum of the picks
    for i in range(k):
        short += mean
        # |short - x_j|^2 without the part common to all; earlier picks are excluded
        pick = (squares - 2 * (x @ short)).argmin()
        picks[i] = pick
        short -= x[pick]
        squares[pick] = torch.inf
    return picks
