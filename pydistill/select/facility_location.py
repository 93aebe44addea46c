"""Greedy facility location: samples such that every other sample is similar to one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill._arguments import check_whole
from pydistill.select._similarity import Cosines

__all__ = ["facility_location_greedy"]

_AT_ONCE = 64  # gains that are recomputed together
# Gains that differ by less are ties: float64 rounding is far below, a float32 embedding's far above.
_TIE = 1e-9


@torch.no_grad()
def facility_location_greedy(embeddings: Tensor, budget: int, *, factors: Tensor | None = None) -> Tensor:
    """Picks samples one by one, each the one that adds most to ``sum_i max_{s in S} s(i, s)``.

    With ``s(i, j) = 0.5 + 0.5 cos(i, j)`` and ``m`` the largest similarity to a pick, zero before there is one::

        gain(j) = (s[:, j] - m).clamp_min(0).sum();      m = maximum(m, s[:, gain.argmax()])

    The picks are those of that loop over the whole matrix s, which is never formed: gains only fall (they are
    submodular), so only the gains that were largest are recomputed (Minoux, 1978), a few columns of s at a
    time. Gains are float64; those less than 1e-9 apart are ties, and the lowest index wins.

    Args:
        embeddings: floating ``[N, d]``.
        budget: picks, 1..N.
        factors: as for `graph_cut_greedy`.

    Returns:
        int64 ``[budget]`` in the order of the picks.

    Raises:
        ValueError: as `graph_cut_greedy` does.
    """
    rows = Cosines(embeddings, factors)
    n, device = len(rows), embeddings.device
    check_whole("budget", budget)
    if not 1 <= budget <= n:
        raise ValueError(f"budget: expected 1..N for {n} embeddings, got {budget}")
    bound = 0.5 * (n + rows.dot(rows.sum()))  # [N]: upper bounds of the gains; initially the gains themselves
    nearest = torch.zeros(n, dtype=torch.float64, device=device)
    picks: list[Tensor] = []
    for _ in range(budget):
        fresh = torch.zeros(n, dtype=torch.bool, device=device)  # whether the bound is the gain itself
        while True:
            best = bound.max()
            front = (bound >= best - _TIE) & ~fresh
            if picks and front.any():
                stale = torch.where(fresh, -torch.inf, bound)
                looked = stale.topk(min(_AT_ONCE, n)).indices
                looked = looked[stale[looked] > -torch.inf]
                similar = rows[looked].to(rows).mul_(0.5).add_(0.5)  # [<= 64, N]
                bound[looked] = (similar - nearest).clamp_min_(0).sum(1)
                fresh[looked] = True
                continue
            pick = (bound >= best - _TIE).to(torch.uint8).argmax()
            break
        picks.append(pick)
        nearest = torch.maximum(nearest, rows[pick[None]].to(rows)[0].mul_(0.5).add_(0.5))
        bound[pick] = -torch.inf
    return torch.stack(picks)
