"""Definition of the cross entropy against hard labels, label logits or label probabilities."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_kind: Literal["hard", "logits", "probs"] = "hard",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """``cross_entropy(logits, labels)``, for label logits with ``labels.softmax(1)``; but ``0 * inf`` is 0."""
    if label_kind == "hard":
        return F.cross_entropy(logits, labels, reduction=reduction, ignore_index=-(2**63))  # that of -100 would be
    target = labels.softmax(1) if label_kind == "logits" else labels
    log_p = logits.log_softmax(1)
    out = (target == 0) & (log_p == -torch.inf)
    rows = -(target * torch.where(out, 0, log_p)).sum(1)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
