"""Definition of the greedy graph cut."""

import torch
from torch import Tensor


def graph_cut_greedy(embeddings: Tensor, budget: int, *, factors: Tensor | None = None, lam: float = 1.0) -> Tensor:
    """Over the whole matrix of similarities, in float64; gains less than 1e-9 apart are ties."""
    x = embeddings.detach().double()
    if factors is not None:
        b = factors.detach().double()
        x = torch.cat([b, (b[:, :, None] * x[:, None]).flatten(1)], 1)
    x = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(torch.float64).tiny)
    s = 0.5 + 0.5 * x @ x.T
    gain, picks = lam * s.sum(0), torch.empty(budget, dtype=torch.int64, device=s.device)
    for k in range(budget):
        picks[k] = (gain >= gain.max() - 1e-9).to(torch.uint8).argmax()
        gain -= 2 * s[picks[k]]
        gain[picks[k]] = -torch.inf
    return picks
