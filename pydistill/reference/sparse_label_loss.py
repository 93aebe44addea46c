"""Definition of the loss against k stored classes of a teacher's distribution: it is made dense."""

from typing import Literal

import torch
from torch import Tensor

from pydistill.reference.kd_divergence import kd_divergence


def densify(
    indices: Tensor, values: Tensor, num_classes: int, tail: Literal["smooth", "zeros", "renorm"] = "smooth"
) -> Tensor:
    """The distributions ``[N, C]`` that k classes per row, ``[N, k]`` both, represent; values in floating point."""
    k = indices.shape[1]
    others = torch.zeros_like(values[:, 0])
    if tail == "renorm":
        values = values / values.sum(1, keepdim=True)
    elif tail == "smooth" and k < num_classes:
        others = (1 - values.sum(1)).clamp(min=0) / (num_classes - k)
    return others[:, None].repeat(1, num_classes).scatter(1, indices, values)


def sparse_label_loss(
    logits: Tensor,
    indices: Tensor,
    values: Tensor,
    T: float = 1.0,
    tail: Literal["smooth", "zeros", "renorm"] = "smooth",
    step: float | None = None,
    kind: Literal["kl", "ce"] = "kl",
    scale_T2: bool = False,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
) -> Tensor:
    """`kd_divergence` of ``logits`` from the densified target; codes become ``exp(-code * step)``."""
    values = torch.exp(-step * values.to(logits.dtype)) if step is not None else values.to(logits.dtype)
    target = densify(indices.long(), values, logits.shape[1], tail)
    name = {"kl": "fkl", "ce": "soft_ce"}[kind]
    return kd_divergence(logits, target, name, T, "probs", scale_T2=scale_T2, reduction=reduction)
