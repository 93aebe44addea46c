"""Definition of the divergence between two softmax attention maps."""

import math
from typing import Literal

import torch
from torch import Tensor


def attention_map_divergence(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    kind: Literal["fkl", "rkl", "jsd", "ce"] = "fkl",
    T_s: float | None = None,
    T_t: float | None = None,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
) -> Tensor:
    """Full maps: ``kl_div(log_softmax(q_s @ k_s.mT / T_s, -1), softmax(q_t @ k_t.mT / T_t, -1))``, by row."""

    def log_softmax(q: Tensor, k: Tensor, T: float | None) -> Tensor:  # [..., N, M]
        scores = q @ k.mT / (math.sqrt(q.shape[-1]) if T is None else T)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).log_softmax(-1)

    def parts(log: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, and their logarithms with zero in place of minus infinity."""
        return log.exp(), log if mask is None else log.masked_fill(~mask, 0.0)

    (s, log_s), (t, log_t) = parts(log_softmax(q_s, k_s, T_s)), parts(log_softmax(q_t, k_t, T_t))
    if kind == "fkl":
        terms = t * (log_t - log_s)
    elif kind == "rkl":
        terms = s * (log_s - log_t)
    elif kind == "ce":
        terms = -t * log_s
    else:
        log_mix = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        terms = beta * t * (log_t - log_mix) + (1 - beta) * s * (log_s - log_mix)
    loss = terms.sum(-1)
    return {"none": loss, "sum": loss.sum(), "batchmean": loss.mean()}[reduction]
