"""Greedy graph cut: the bins of Dataset Quantization (Zhou et al., ICCV 2023)."""

from __future__ import annotations

import numpy as np
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
    number of threads or the instruction set, unless two gains differ by 1e-9 to within float64's rounding. The work is
    done on the CPU.

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
    all_rows = Cosines(embeddings.cpu(), None if factors is None else factors.cpu())
    if budget < 1 or bins < 1 or bins * budget > len(all_rows):
        got = f"{budget}" if bins == 1 else f"{bins} bins of {budget}"
        raise ValueError(f"budget: expected 1..N in all for {len(all_rows)} embeddings, got {got}")
    if not 0 <= lam < float("inf"):
        raise ValueError(f"lam: expected a number of at least 0, got {lam}")
    left = torch.arange(len(all_rows))
    picked = []
    for _ in range(bins):
        rows = all_rows if len(left) == len(all_rows) else all_rows[left]
        picks = torch.from_numpy(_greedy(rows, budget, lam))
        picked.append(left[picks])
        remains = torch.ones(len(left), dtype=torch.bool)
        remains[picks] = False
        left = left[remains]
    return (torch.stack(picked) if bins > 1 else picked[0]).to(embeddings.device)


def _greedy(rows: Cosines, budget: int, lam: float) -> np.ndarray:
    """The gain of j is linear in the sum of the picks' unit vectors g: ``lam s[D][:, j].sum() - |S| - g_j . sum(g)``.

    So it costs O(d) to know one gain, and who can be the best is told by bounds. Since the last pass over all rows the
    sum has moved by w; what w does to row j is known but for the part of w outside a few directions, coordinates p:

        |g_j . w - p_j . p_w| <= sqrt(1 - |p_j|^2) sqrt(|w|^2 - |p_w|^2)

    In NumPy, whose calls cost a fraction of torch's: a pick is a score of small ones.
    """
    n = len(rows)
    total = rows.sum()
    gains = (lam * 0.5 * (n + rows.dot(total))).numpy()  # [N], exact at the last pass
    p = rows.coordinates(total).numpy()  # [N, q]
    outside = np.sqrt(np.maximum(1 - np.einsum("nq,nq->n", p, p), 0))
    unit, factors = rows.unit.numpy(), None if rows.factors is None else rows.factors.numpy()
    moved, p_moved, at_pass = np.zeros(tuple(total.shape)), np.zeros(p.shape[1]), 0

    def exact(index: np.ndarray | int, since: int) -> np.ndarray:
        """The gains of some rows."""
        if factors is None:
            return gains[index] - since - unit[index] @ moved
        return gains[index] - since - ((unit[index] @ moved.T) * factors[index]).sum(-1)

    estimate, bound, candidate = gains.copy(), np.empty(n), np.empty(n, dtype=bool)
    picks = np.empty(budget, dtype=np.int64)
    read = 0  # rows since the last pass
    for k in range(budget):
        since = k - at_pass
        near = None
        if since:
            radius = max(float(np.vdot(moved, moved) - p_moved @ p_moved), 0.0) ** 0.5
            floor = exact(int(estimate.argmax()), since)
            np.multiply(outside, radius, out=bound)
            bound += estimate
            near = np.greater_equal(bound, floor - 2 * TIE, out=candidate).nonzero()[0]
            read += len(near)
            if read > n // 2 or len(near) > n // 8:  # to read them all in order is no dearer
                gains -= since + rows.dot(torch.from_numpy(moved)).numpy()
                gains[picks[at_pass:k]] = -np.inf
                estimate[:], moved[:], p_moved[:] = gains, 0, 0
                at_pass, read, near = k, 0, None
        here = gains if near is None else exact(near, since)
        pick = int((here >= here.max() - TIE).argmax())
        pick = pick if near is None else int(near[pick])
        picks[k] = pick
        moved += unit[pick] if factors is None else np.outer(factors[pick], unit[pick])
        p_moved += p[pick]
        np.dot(p, p[pick], out=bound)
        bound += 1
        estimate -= bound
        estimate[pick] = -np.inf  # and so below any floor
    return picks
