"""Definition of the divergence between a student's logits and a target."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_divergence(
    student_logits: Tensor,
    target: Tensor,
    kind: Literal["fkl", "rkl", "jsd", "soft_ce", "ce", "mse", "ofa"] = "fkl",
    T: float = 1.0,
    target_is: Literal["logits", "probs"] = "logits",
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    weight: Tensor | None = None,
    scale_T2: bool = True,
    beta: float = 0.5,
    gamma: float = 1.0,
    reduction: Literal["batchmean", "mean", "sum", "none"] = "batchmean",
) -> Tensor:
    """See `pydistill.kd_divergence`: each term as written there, on ``[..., C]``."""
    C = student_logits.shape[-1]
    log_q = _log_softmax(student_logits, T)
    if kind == "mse":
        rows = ((student_logits - target) / T).square().sum(-1)
    elif kind == "ce":
        rows = -log_q.gather(-1, target[..., None]).squeeze(-1)
    else:
        log_p = target.log() if target_is == "probs" else _log_softmax(target, T)
        p, q = target if target_is == "probs" else log_p.exp(), log_q.exp()
        if kind == "fkl":
            rows = _weighted(p, log_p - log_q).sum(-1)
        elif kind == "rkl":
            rows = _weighted(q, log_q - log_p).sum(-1)
        elif kind == "jsd":
            # the mixture in units of the larger of p and q: by itself it may underflow
            apart = torch.where((p == 0) & (q == 0), 0, log_q - log_p)
            less = apart <= 0
            to_q, to_p = torch.where(less, apart, 0), torch.where(less, 0, -apart)  # log q and log p in these units
            log_m = torch.where(less, (1 - beta) * to_q.expm1(), beta * to_p.expm1()).log1p()
            rows = (beta * _weighted(p, to_p - log_m) + (1 - beta) * _weighted(q, to_q - log_m)).sum(-1)
        elif kind == "soft_ce":
            rows = -_weighted(p, log_q).sum(-1)
        else:
            own = F.one_hot(labels, C).bool()
            t = torch.where(own, torch.expm1(gamma * p.log1p()), torch.exp(gamma * log_p))  # (p + 1_y)^gamma - 1_y
            rows = -_weighted(t, log_q).sum(-1)
    if scale_T2:
        rows = rows * T**2
    if reduction == "mean":
        rows = rows / C
    if ce_weight:
        rows = rows - ce_weight * student_logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    if weight is not None:
        rows = rows * weight
    return {"none": rows, "sum": rows.sum()}[reduction] if reduction in ("none", "sum") else rows.mean()


def _log_softmax(x: Tensor, T: float) -> Tensor:
    """Of x / T; the largest x is subtracted first, so that rounding does not swallow the differences."""
    return ((x - x.detach().amax(-1, keepdim=True)) / T).log_softmax(-1)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; zero (in every derivative, too) where the weight is zero, whatever the value."""
    none = weight == 0
    return torch.where(none, 0, weight * torch.where(none, 0, value))
