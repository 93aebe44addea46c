"""How hard a network finds each sample, from one pass over its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydistill.ops._rows import check_class_numbers, check_floating

KINDS = ("ce", "el2n", "margin", "entropy")


@torch.no_grad()
def sample_scores(logits: Tensor, labels: Tensor, kinds: Sequence[str] = KINDS) -> dict[str, Tensor]:
    """Scores by which PCA (prune, combine, augment) and others choose samples: larger is harder, except for margin.

    With ``p = logits.softmax(1)``, computed once for all, and y the label:

    ======= ============================================================================================
    ce      ``-log p_y``
    el2n    ``|p - onehot(y)|`` in L2 (Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", 2021)
    margin  ``z_y`` minus the largest other logit: below zero if misclassified (AUM's summand)
    entropy ``-sum p log p`` in nats
    ======= ============================================================================================

    Args:
        logits: ``[N, C]`` with C >= 1; float32, float64, bfloat16 or float16. All arithmetic is in float32 (float64 for
            float64). They get no gradient.
        labels: int64 class numbers ``[N]``.
        kinds: which ones, of the four.

    Returns:
        The scores by name, ``[N]`` each, in float32 (float64 for float64). With a single class the margin is infinite.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, a device or a name does not fit, or a class number is not in 0..C-1 (checked on the CPU).
    """
    _check(logits, labels, kinds)
    z = logits if logits.dtype == torch.float64 else logits.float()
    own = labels[:, None]
    scores: dict[str, Tensor] = {}
    if {"ce", "el2n", "entropy"} & set(kinds):
        log_p = z.log_softmax(1)
        log_own = log_p.gather(1, own).squeeze(1)
        if "ce" in kinds:
            scores["ce"] = -log_own
        if {"el2n", "entropy"} & set(kinds):
            p = log_p.exp()
            if "el2n" in kinds:
                # leaving p_y's square out of the sum avoids a difference of nearly equal numbers
                others = p.scatter(1, own, 0.0)
                scores["el2n"] = (others.square().sum(1) + torch.expm1(log_own).square()).sqrt()
            if "entropy" in kinds:
                scores["entropy"] = -torch.where(p == 0, 0, p * log_p).sum(1)
    if "margin" in kinds:
        scores["margin"] = z.gather(1, own).squeeze(1) - z.scatter(1, own, -torch.inf).amax(1)
    return {name: scores[name] for name in kinds}


def _check(logits: Tensor, labels: Tensor, kinds: Sequence[str]) -> None:
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kinds!r}")
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [N, C] with at least one class, got shape {list(logits.shape)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64 class numbers, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected shape {list(logits.shape[:1])}, got {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels: expected device {logits.device} as logits, got {labels.device}")
    check_class_numbers("labels", labels, logits.shape[1])
