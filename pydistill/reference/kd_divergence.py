"""Definition of the divergence between a student's logits and a target."""

from typing import Literal

import torch
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
    """See `pydistill.kd_divergence`: each term as it stands there, on ``[..., C]``."""
    C = student_logits.shape[-1]
    z = student_logits / T
    log_q = z.log_softmax(-1)
    if kind == "mse":
        rows = (z - target / T).square().sum(-1)
    elif kind == "ce":
        rows = -log_q.gather(-1, target[..., None]).squeeze(-1)
    else:
        p, log_p = (target / T).softmax(-1), (target / T).log_softmax(-1)
        if target_is == "probs":
            p, log_p = target, target.log()
        q = log_q.exp()
        if kind == "fkl":
            rows = _weighted(p, log_p - log_q).sum(-1)
        elif kind == "rkl":
            rows = _weighted(q, log_q - log_p).sum(-1)
        elif kind == "jsd":
            log_m = (beta * p + (1 - beta) * q).log()
            rows = beta * _weighted(p, log_p - log_m).sum(-1) + (1 - beta) * _weighted(q, log_q - log_m).sum(-1)
        elif kind == "soft_ce":
            rows = -_weighted(p, log_q).sum(-1)
        else:
            one = torch.nn.functional.one_hot(labels, C).to(p.dtype)
            rows = -_weighted((p + one) ** gamma - one, log_q).sum(-1)
    if scale_T2:
        rows = rows * T**2
    if reduction == "mean":
        rows = rows / C
    if ce_weight:
        rows = rows - ce_weight * student_logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    if weight is not None:
        rows = rows * weight
    return {"none": rows, "sum": rows.sum()}[reduction] if reduction in ("none", "sum") else rows.mean()


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Their product, and nothing (in every derivative, too) where there is no weight, whatever the value."""
    none = weight == 0
    return torch.where(none, 0, weight * torch.where(none, 0, value))
