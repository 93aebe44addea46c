"""Greedy graph cut: the bins of Dataset Quantization (Zhou et al., ICCV 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill.select._similarity import Cosines

__all__ = ["graph_cut_greedy"]

# Gains that differ by less are ties: float64 rounding is far below, a float32 embedding's far above.
TIE = 1e-9


@torch.no_grad()
def graph_cut_greedy(
    embeddings: Tensor, budget: int, *, factors: Tensor | None = None, lam: float = 1.0, bins: int = 1
) -> Tensor:
    """Picks samples one by one, each the one that maximises the graph-cut gain, in bins of ``budget``.

    With ``s(i, j) = 0.5 + 0.5 cos(i, j)``, D the samples that no earlier bin has and S those picked for this one::

        gain(j) = lam * s[D][:, j].sum() - 2 * s[S][:, j].sum();      S.append(gain.argmax())

    The picks are those of that loop over the whole matrix s, which is never formed: memory is O(N d). A pick takes
    one pass over N numbers, or N C with factors, and O(d), or O(C d), for each sample that bounds leave in question;
    embeddings without any structure leave so many that it takes O(N d).

    Gains are float64; those less than 1e-9 apart are ties, and the lowest index wins. So the picks do not depend on the
    number of threads, the instruction set or the device, unless two gains differ by 1e-9 to within float64's rounding.

    Args:
        embeddings: floating ``[N, d]``, such as the features before a classifier.
        budget: picks for each bin.
        factors: floating ``[N, C]``, the gradients of the loss in the logits: the similarity is then that of the
            classifier's gradients ``[b, b (x) e]``, as in the paper's code, from ``d + C`` numbers a sample.
        lam: weight of the similarity to all of D, at least 0.
        bins: disjoint bins, one after the other, each from what is left.

    Returns:
        int64 ``[budget]`` in the order of the picks; ``[bins, budget]`` for several bins.

    Raises:
        ValueError: ``bins * budget`` is not in 1..N, lam is negative, or the embeddings or factors have a wrong shape,
            or values that are not finite.
    """
    all_rows = Cosines(embeddings, factors)
    if budget < 1 or bins < 1 or bins * budget > len(all_rows):
        got = f"{budget}" if bins == 1 else f"{bins} bins of {budget}"
        raise ValueError(f"budget: expected 1..N in all for {len(all_rows)} embeddings, got {got}")
    if not 0 <= lam < float("inf"):
        raise ValueError(f"lam: expected a number of at least 0, got {lam}")
    left = torch.arange(len(all_rows), device=embeddings.device)
    picked = []
    for _ in range(bins):
        rows = all_rows if len(left) == len(all_rows) else all_rows[left]
        picks = _greedy(rows, budget, lam)
        picked.append(left[picks])
        remains = torch.ones(len(left), dtype=torch.bool, device=left.device)
        remains[picks] = False
        left = left[remains]
    return torch.stack(picked) if bins > 1 else picked[0]


def _greedy(rows: Cosines, budget: int, lam: float) -> Tensor:
    """The gain of j is linear in the sum of the picks' unit vectors g: ``lam s[D][:, j].sum() - |S| - g_j . sum(g)``.

    So it costs O(d) to know one gain, and who can be the best is told by bounds. Since the last pass over all rows the
    sum has moved by w; what w does to row j is known but for the part of w outside a few directions, coordinates p:

        |g_j . w - p_j . p_w| <= sqrt(1 - |p_j|^2) sqrt(|w|^2 - |p_w|^2)
    """
    n, device = len(rows), rows.unit.device
    gains = lam * 0.5 * (n + rows.dot(rows.sum()))  # [N], exact after the first `known` picks
    p = rows.coordinates()  # [N, q]
    outside = (1 - p.square().sum(1)).clamp_min_(0).sqrt_()
    estimate = gains.clone()
    moved, p_moved = torch.zeros_like(rows.sum()), torch.zeros_like(p[0])
    picks = torch.empty(budget, dtype=torch.int64, device=device)
    known = read = 0  # rows read since then
    for k in range(budget):
        since = k - known
        near = None
        if since:
            radius = float((moved.square().sum() - p_moved.square().sum()).clamp_min(0).sqrt())
            guess = estimate.argmax()[None]
            floor = gains[guess] - since - rows[guess].dot(moved)
            near = (torch.add(estimate, outside, alpha=radius) >= floor - 2 * TIE).nonzero()[:, 0]
            read += len(near)
            if read > n or len(near) > n // 8:  # to read them all is no dearer
                gains -= since + rows.dot(moved)
                gains[picks[known:k]] = -torch.inf
                estimate.copy_(gains)
                moved.zero_(), p_moved.zero_()
                known, read, near = k, 0, None
        exact = gains if near is None else gains[near] - since - rows[near].dot(moved)
        if near is not None:
            exact[estimate[near] == -torch.inf] = -torch.inf
        first = (exact >= exact.max() - TIE).to(torch.uint8).argmax()
        pick = first if near is None else near[first]
        picks[k] = pick
        moved += rows[pick[None]].sum()
        p_moved += p[pick]
        estimate -= 1 + p @ p[pick]
        estimate[pick] = -torch.inf
    return picks
