"""Distance between the class means of two sets of features: distribution matching."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill.ops._operator import check_plain_backend

__all__ = ["check_classes", "class_mean_match", "class_means"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def class_mean_match(
    f_real: Tensor,
    f_syn: Tensor,
    labels_real: Tensor,
    labels_syn: Tensor,
    *,
    num_classes: int | None = None,
    reduction: Literal["sum", "mean", "none"] = "sum",
    backend: str = "auto",
) -> Tensor:
    """Squared distance between the class means of real and of synthetic features, for all classes at once.

    Equivalent to ``sum((f_real[labels_real == k].mean(0) - f_syn[labels_syn == k].mean(0)).square().sum() for k in
    range(num_classes))``, for classes of any size. It is the loss of distribution matching (DM: Zhao, Bilen, WACV
    2023), the last term of DataDAM (Sajedi et al., ICCV 2023) and the clients' loss in FedLGD (Huang et al., TMLR
    2024). Differentiable to any order in both features. Equal bits across runs, but not across thread counts, by which
    torch's matrix product splits its sums.

    Args:
        f_real: ``[B, d]`` features; float32, float64, bfloat16 or float16. Means are taken in float32 (float64 for
            float64).
        f_syn: ``[b, d]`` features, likewise; the dtypes may differ.
        labels_real: int64 ``[B]`` class numbers.
        labels_syn: int64 ``[b]`` class numbers.
        num_classes: K. When None, it is one more than the largest label, which synchronises with the device once;
            nothing else does. ``torch.compile(fullgraph=True)`` needs it.
        reduction: "sum" over the classes, "mean" over those that the labels name, or "none".
        backend: "auto" or "reference": it is plain torch on every device.

    Returns:
        A scalar, or ``[K]`` for reduction "none", with 0 for a class on neither side; in float32 or float64.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit, or `check_classes` finds the labels wrong.
    """
    check_choice("reduction", reduction, ("sum", "mean", "none"))
    check_plain_backend("class_mean_match", backend)
    _check_features("real", f_real, labels_real)
    _check_features("syn", f_syn, labels_syn)
    if f_syn.shape[1] != f_real.shape[1] or f_syn.device != f_real.device:
        wanted = f"[b, {f_real.shape[1]}] on {f_real.device} as f_real"
        raise ValueError(f"f_syn: expected {wanted}, got {list(f_syn.shape)} on {f_syn.device}")
    num_classes = check_classes(labels_real, labels_syn, num_classes)
    difference = class_means(f_real, labels_real, num_classes) - class_means(f_syn, labels_syn, num_classes)
    numbers = torch.arange(num_classes, device=labels_real.device)[:, None]
    present = (labels_real == numbers).any(1) | (labels_syn == numbers).any(1)
    # masked before the square: the derivative at a NaN would pass through a later mask
    distances = difference.masked_fill(~present[:, None], 0).square().sum(1)  # [K]
    if reduction == "none":
        return distances
    return distances.sum() / present.sum() if reduction == "mean" else distances.sum()


def class_means(f: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean row of each class, by one product with one-hot weights; NaN for a class without rows.

    Equivalent to ``torch.stack([f[labels == k].mean(0) for k in range(num_classes)])``, without waiting for the device.
    Differentiable to any order; a class without rows gives no gradient. A NaN or an infinity affects the means of all
    classes, not only its own: the product multiplies it by zero.

    Args:
        f: ``[B, d]``, floating; summed in float32 (float64 for float64).
        labels: int64 ``[B]``; rows with a label outside 0..num_classes-1 belong to no class.
        num_classes: K.

    Returns:
        ``[K, d]``, float32 or float64.
    """
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    members = labels == torch.arange(num_classes, device=labels.device)[:, None]  # [K, B]
    counts = members.sum(1, keepdim=True)  # [K, 1]
    with torch.autocast(f.device.type, enabled=False):
        sums = members.to(f.dtype) @ f
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.nan)


def check_classes(labels_real: Tensor, labels_syn: Tensor, num_classes: int | None = None) -> int:
    """The number of classes, after checking that both sides have rows of the same ones.

    Labels are checked on the CPU only, outside of ``torch.compile`` and ``vmap``. Elsewhere nothing waits for the
    device: a class that one side lacks makes the mean of `class_means`, and so a loss, NaN, and rows with an
    out-of-range label are ignored.

    Args:
        labels_real: int64 ``[B]``.
        labels_syn: int64 ``[b]``.
        num_classes: K, or None for one more than the largest label, which waits for the device.

    Raises:
        TypeError: labels are not int64.
        ValueError: there is no label at all, one is outside of 0..K-1, or a class is on one side only.
    """
    sides = {"labels_real": labels_real, "labels_syn": labels_syn}
    for name, labels in sides.items():
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 class numbers, got {labels.dtype}")
    if not any(labels.numel() for labels in sides.values()):
        raise ValueError("labels_real, labels_syn: expected rows of at least one class, got none")
    if num_classes is None:
        if torch.compiler.is_dynamo_compiling():  # whose fullgraph=True raises with these words
            torch._dynamo.graph_break("num_classes: expected the number of classes in a whole graph, got None")
        num_classes = 1 + max(int(labels.max()) for labels in sides.values() if labels.numel())
        if num_classes < 1:
            raise ValueError(f"labels_real, labels_syn: expected class numbers of at least 0, got {num_classes - 1}")
    elif num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if labels_real.device.type != "cpu" or torch.compiler.is_compiling():
        return num_classes
    try:
        found = {name: labels.unique().tolist() for name, labels in sides.items()}
    except RuntimeError:  # the values of fake tensors and those under vmap are not accessible
        return num_classes
    for name, classes in found.items():
        for label in classes:
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"{name}: expected class numbers in 0..{num_classes - 1} for {num_classes} classes, got {label}"
                )
    for name, other in (("labels_real", "labels_syn"), ("labels_syn", "labels_real")):
        if missing := sorted(set(found[other]) - set(found[name])):
            raise ValueError(f"{name}: expected rows of class {missing[0]}, which {other} has, got none")
    return num_classes


def _check_features(side: str, f: Tensor, labels: Tensor) -> None:
    for name, tensor in ((f"f_{side}", f), (f"labels_{side}", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if f.dtype not in _FLOATING:
        raise TypeError(f"f_{side}: expected float32, float64, bfloat16 or float16, got {f.dtype}")
    if f.dim() != 2:
        raise ValueError(f"f_{side}: expected [rows, d], got {list(f.shape)}")
    if labels.shape != f.shape[:1] or labels.device != f.device:
        wanted = f"[{f.shape[0]}] on {f.device} as f_{side}"
        raise ValueError(f"labels_{side}: expected {wanted}, got {list(labels.shape)} on {labels.device}")
