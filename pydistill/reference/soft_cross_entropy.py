"""Definition of the cross entropy against hard labels, label logits or label probabilities."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    kind: Literal["hard", "logits", "probs"] = "hard",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """``cross_entropy(logits, labels.softmax(1) if kind == "logits" else labels)``; no class number is ignored."""
    target = labels.softmax(1) if kind == "logits" else labels
    return F.cross_entropy(logits, target, reduction=reduction, ignore_index=-(2**63))  # that of -100 would be
