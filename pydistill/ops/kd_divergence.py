"""Divergence between a student's logits and a teacher's logits or probabilities, one pass over each row of both.

Four operators, each a pure function of its arguments, with f the rows' losses as a function of the student's logits:

    forward        f, and its gradient in each row if it will be needed
    backward       <grad, f>'s gradient
    jvp            f's derivative along student_t
    backward_jvp   the derivatives of f and of backward along student_t (and along grad_t)

They are closed under differentiation up to second order, like those of `pydistill.ops.soft_cross_entropy`. The first
backward pass through a graph scales the kept gradient in place; a second one, and one that is to be differentiated,
recomputes it. They exist twice: in C++ (``torch.ops.pydistill``) and in Triton (``torch.ops.pydistill_triton``).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._arguments import check_choice
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._rows import (
    batch_into_rows,
    check_class_numbers,
    check_floating,
    compute_dtype,
    scale_kept,
    under_autocast,
    widened,
)

BACKENDS = ("reference", "cpu", "triton")
# in the order of Kind in csrc/kernels/kd_divergence.h
KINDS = ("fkl", "rkl", "jsd", "soft_ce", "ce", "mse", "ofa")


def kd_divergence(
    student_logits: Tensor,
    target: Tensor,
    *,
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
    backend: str = "auto",
) -> Tensor:
    """Divergence of a student's softmax from a teacher's at temperature T, optionally plus the labels' cross entropy.

    For the defaults equivalent to ``T**2 * F.kl_div((student_logits / T).log_softmax(-1), (target / T).softmax(-1),
    reduction="batchmean")`` (Hinton et al., 2015). SRe2L (Yin et al., NeurIPS 2023), CDA, DWA and INFER train on stored
    labels (FKD) with ``T=20, scale_T2=False``; HeLlO (Yu et al., 2024) with ``kind="mse", reduction="mean"``, labels
    and a ce_weight. For each row, with q the softmax of ``student_logits / T`` and p that of ``target / T``:

    ========= ==========================================================================================
    fkl       ``KL(p || q) = sum p (log p - log q)``
    rkl       ``KL(q || p)``
    jsd       ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``
    soft_ce   ``-sum p log q``
    ce        ``-log q`` at the row's class number, which ``target`` holds
    mse       ``sum ((student_logits - target) / T)**2``
    ofa       ``-sum ((p + 1_y)**gamma - 1_y) log q`` with y from ``labels`` (Hao et al., "One-for-All", NeurIPS 2023)
    ========= ==========================================================================================

    A class of zero probability adds nothing (``0 * inf`` is 0), so that classes masked with -inf on both sides take no
    part. One masked on a single side makes infinite what divides by its probability: "fkl", "soft_ce" and "ofa" if the
    student lacks it (still with the gradient ``q - p``), "rkl" if the target does (the gradient is NaN). Logits and T
    may be of any size: no exponential overflows, no mixture of "jsd" underflows.

    The gradient goes to the student's logits, and to ``weight``. It is computed in the forward pass, while the
    probabilities are at hand; the first backward pass only scales it. Differentiable twice, in reverse and forward
    mode, under ``torch.func`` and ``torch.compile``; a third derivative raises ``NotImplementedError``. On the CPU,
    results have equal bits across runs, thread counts and instruction sets. NaN and Inf propagate.

    Args:
        student_logits: ``[..., C]`` with C >= 1; float32, float64, bfloat16 or float16, any strides. All arithmetic is
            in float32 (float64 where either side is float64).
        target: the teacher's ``[..., C]``, floating, of any of these dtypes; int64 class numbers ``[...]`` for "ce".
        kind: see above.
        T: divisor of both sides' logits; above zero.
        target_is: "logits", or "probs": distributions already at temperature T, used as they are (rows need not sum to
            one). "mse" takes logits only.
        labels: int64 class numbers ``[...]``, for the cross entropy and "ofa".
        ce_weight: weight of the added cross entropy of ``student_logits`` (at temperature 1) against ``labels``.
        weight: of each row, floating ``[...]``; the reductions do not divide by its sum.
        scale_T2: multiply the divergence (not the cross entropy) by ``T**2``, so that gradients keep their size.
        beta: for "jsd", between 0 and 1.
        gamma: for "ofa"; above zero.
        reduction: "batchmean": the mean over rows, all leading dimensions; "mean": the divergence is also divided by
            C, as in ``F.kl_div`` and ``F.mse_loss`` (the cross entropy is not); "sum"; or "none".
        backend: "auto" (the device's kernel: C++ on the CPU, Triton on GPUs), "reference" (plain torch, any device),
            "cpu", or "triton" (not in float64; the CPU in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        A scalar, or ``[...]`` for reduction "none"; in the student's dtype, in float32 under autocast. The mean of no
        rows is NaN, as in torch.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit; a class number is not in 0..C-1 (checked on the CPU only,
            outside of ``vmap`` and ``torch.compile``; elsewhere its row is NaN); the target requires a gradient:
            detach it (`pydistill.soft_cross_entropy` is the loss for learned labels).
        NotImplementedError: the backend cannot run here, or a third derivative is asked for.
    """
    _check_options(
        kind=kind, T=T, target_is=target_is, ce_weight=ce_weight, beta=beta, gamma=gamma, reduction=reduction
    )
    _check_tensors(student_logits, target, labels, weight, kind, ce_weight)
    chosen = choose_backend("kd_divergence", backend, student_logits.device, BACKENDS)
    student = student_logits
    if kind != "ce" and torch.float64 in (student.dtype, target.dtype):
        student, target = student.double(), target.double()
    if chosen == "reference":
        if kind != "ce":
            target = target.to(student.dtype)
        loss = widened(reference.kd_divergence)(
            student,
            target,
            kind=kind,
            T=T,
            target_is=target_is,
            labels=labels,
            ce_weight=ce_weight,
            weight=weight,
            scale_T2=scale_T2,
            beta=beta,
            gamma=gamma,
            reduction=reduction,
        )
        return loss if under_autocast(student) else loss.to(student_logits.dtype)

    if chosen == "triton" and student.dtype == torch.float64:
        raise NotImplementedError(
            "kd_divergence: backend='triton' has no kernel for float64; backend='reference' runs anywhere"
        )
    C = student.shape[-1]
    scale = (T**2 if scale_T2 else 1.0) / (C if reduction == "mean" else 1)
    rows: Tensor | None = target
    if kind == "ce":
        labels, rows = target, None
    loss = (_triton if chosen == "triton" else _native).forward(
        student.reshape(-1, C),
        None if rows is None else rows.reshape(-1, C),
        None if labels is None else labels.reshape(-1),
        *(KINDS.index(kind), target_is == "probs", float(T), float(scale), float(ce_weight), float(beta), float(gamma)),
        torch.is_grad_enabled() and student.requires_grad,
    )[0]
    if weight is not None:
        loss = loss * weight.reshape(-1)
    if reduction == "none":
        loss = loss.reshape(student.shape[:-1])
    else:
        loss = loss.sum() if reduction == "sum" else loss.mean()
    return loss if under_autocast(student) else loss.to(student_logits.dtype)


def _check_options(
    kind: str, T: float, target_is: str, ce_weight: float, beta: float, gamma: float, reduction: str
) -> None:
    check_choice("kind", kind, KINDS)
    check_choice("target_is", target_is, ("logits", "probs"))
    if kind == "mse" and target_is == "probs":
        raise ValueError("target_is: expected 'logits' for kind='mse', got 'probs'")
    check_choice("reduction", reduction, ("batchmean", "mean", "sum", "none"))
    for name, value in (("T", T), ("gamma", gamma)):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta!r}")
    if not (isinstance(ce_weight, int | float) and math.isfinite(ce_weight)):
        raise ValueError(f"ce_weight: expected a number, got {ce_weight!r}")


def _check_tensors(
    student: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None, kind: str, ce_weight: float
) -> None:
    check_floating("student_logits", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits: expected [..., C] with at least one class, got shape {list(student.shape)}")
    rows, C = student.shape[:-1], student.shape[-1]
    if kind == "ce":
        if labels is not None:
            raise ValueError("labels: expected None for kind='ce', whose class numbers stand in target, got a tensor")
        _check_labels("target", target, rows, C)
    else:
        check_floating("target", target)
        if target.dim() and target.shape[-1] != C:
            raise ValueError(f"target: expected {C} classes as student_logits, got {target.shape[-1]}")
        if target.shape != student.shape:
            raise ValueError(
                f"target: expected shape {list(student.shape)} as student_logits, got {list(target.shape)}"
            )
        if torch.is_grad_enabled() and target.requires_grad:
            raise ValueError(
                "target: expected a teacher without gradient, got a tensor that requires one; pass target.detach(), or "
                "take soft_cross_entropy for labels that are learned"
            )
    if labels is not None:
        _check_labels("labels", labels, rows, C)
    elif kind == "ofa" or ce_weight:
        raise ValueError(f"labels: expected class numbers for {'ofa' if kind == 'ofa' else 'a ce_weight'}, got None")
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != rows:
            raise ValueError(f"weight: expected a weight for each row, shape {list(rows)}, got {list(weight.shape)}")
    for name, tensor in (("target", target), ("labels", labels), ("weight", weight)):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(f"{name}: expected device {student.device} as student_logits, got {tensor.device}")


def _check_labels(name: str, labels: Tensor, rows: torch.Size, C: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class numbers, got {labels.dtype}")
    if labels.shape != rows:
        raise ValueError(f"{name}: expected a class number for each row, shape {list(rows)}, got {list(labels.shape)}")
    check_class_numbers(name, labels, C)


# In every formula below: `saved` are the operator's tensors, `options` are (kind, probs, T, scale, ...).


def _losses(student: Tensor) -> Tensor:
    return student.new_empty((student.shape[0],), dtype=compute_dtype(student))


def _forward_fake(student: Tensor, target: Tensor | None, labels: Tensor | None, *options: Any) -> tuple:
    N, C = student.shape
    return _losses(student), student.new_empty((N, C if options[-1] else 0))


def _backward_fake(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(tuple(student.shape))


def _jvp_fake(student: Tensor, *rest: Any) -> Tensor:
    return _losses(student)


def _backward_jvp_fake(grad: Tensor, grad_t: Tensor | None, student: Tensor, *rest: Any) -> tuple:
    return _losses(student), student.new_empty(tuple(student.shape))


class _Operators:
    """The operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "kd_divergence",
            tensors=3,
            fake=_forward_fake,
            vjp=self._forward_vjp,
            jvp=lambda saved, options, student_t, *_: (self.jvp(*saved, student_t, *options[:-1]), None),
            vmap=batch_into_rows(lambda *args: self.forward.raw(*args), 3),
            kept=1,
            library=library,
        )
        self.backward: Operator = Operator(
            "kd_divergence_backward",
            tensors=4,
            fake=_backward_fake,
            vjp=self._backward_vjp,
            jvp=self._backward_forward_jvp,
            vmap=batch_into_rows(lambda *args: self.backward.raw(*args), 4),
            library=library,
        )
        self.jvp: Operator = Operator(
            "kd_divergence_jvp",
            tensors=4,
            fake=_jvp_fake,
            vjp=self._jvp_vjp,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.jvp.raw(*args), 4),
            library=library,
        )
        self.backward_jvp: Operator = Operator(
            "kd_divergence_backward_jvp",
            tensors=6,
            fake=_backward_jvp_fake,
            vjp=None,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.backward_jvp.raw(*args), 6),
            library=library,
        )

    def _forward_vjp(self, saved: tuple, options: tuple, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:  # no gradient reaches the loss
            return None, None, None
        *inputs, kept = saved
        *rest, keep = options
        scaled = scale_kept(ctx, kept, grad) if keep else None
        return self.backward(grad, *inputs, *rest) if scaled is None else scaled, None, None

    def _backward_vjp(self, saved: tuple, options: tuple, direction: Tensor) -> tuple:
        grad, *inputs = saved
        return *self.backward_jvp(grad, None, *inputs, direction, *options), None, None

    def _backward_forward_jvp(self, saved: tuple, options: tuple, grad_t: Tensor, student_t: Tensor, *_: Any) -> Tensor:
        grad, *inputs = saved
        return self.backward_jvp(grad, grad_t, *inputs, student_t, *options)[1]

    def _jvp_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        *inputs, direction = saved
        to_student = self.backward_jvp(grad, None, *inputs, direction, *options)[1]
        to_direction = self.backward(grad, *inputs, *options)  # jvp is linear in the direction
        return to_student, None, None, to_direction


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import kd_divergence as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "kd_divergence", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "kd_divergence_backward", _backward_fake, _triton_fill("backward"))
register_filled(_triton_library, "kd_divergence_jvp", _jvp_fake, _triton_fill("jvp"))
register_filled(_triton_library, "kd_divergence_backward_jvp", _backward_jvp_fake, _triton_fill("backward_jvp"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
