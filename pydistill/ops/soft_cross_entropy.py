"""Cross entropy of logits against hard labels, label logits or label probabilities, in one pass over each row.

Four operators, each a pure function of its arguments, with f the rows' losses and L = <grad, f(logits, labels)>:

    forward        loss                 = f
    backward       grad                 = dL                            with respect to (logits, labels)
    jvp            loss_t               = f's derivative along (logits_t, labels_t)
    backward_jvp   loss_t and grad_t    = the derivatives of f and of backward along them (and along grad_t)

They are closed under differentiation up to second order: dL's Hessian is symmetric, so the vector-Jacobian products of
``backward`` and ``jvp`` are ``backward_jvp`` along the incoming gradient. Hard labels have no derivative; where a form
returns one, it is a ``[N, 0]`` tensor, and their direction is not looked at.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._arguments import check_choice
from pydistill._renamed import renamed
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._rows import (
    batch_into_rows,
    check_class_numbers,
    check_floating,
    compute_dtype,
    under_autocast,
    widened,
)

BACKENDS = ("reference", "cpu", "cuda", "triton")
KINDS = ("hard", "logits", "probs")  # in the order of Kind in csrc/kernels/soft_cross_entropy.h
HARD = KINDS.index("hard")


@renamed(kind="label_kind")
def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_kind: Literal["hard", "logits", "probs"] = "hard",
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of each row of logits against its label, averaged over the rows.

    Equivalent to ``F.cross_entropy(logits, labels, reduction=reduction)``, for label logits with ``labels.softmax(1)``.
    Learned soft labels are how TESLA (Cui et al., ICML 2023) assigns them and DATM (Guo et al., ICLR 2024) optimises
    them, as probabilities or as logits. Differentiable twice in logits and floating labels, in reverse and forward
    mode, under ``torch.func`` and ``torch.compile``; a third derivative raises ``NotImplementedError``. Deterministic:
    equal bits from run to run, over thread counts and, on the CPU, over instruction sets. NaN and Inf propagate as in
    torch, but for a class with a logit of -inf whose label is zero (with "logits": -inf too): it takes no part, in no
    derivative either, where torch has ``0 * inf``, NaN.

    Args:
        logits: ``[N, K]`` with K >= 1; float32, float64, bfloat16 or float16, any strides. All arithmetic is in float32
            (float64 for float64).
        labels: int64 ``[N]`` class numbers where label_kind is "hard"; floating ``[N, K]`` for "logits" (a softmax is
            taken) and "probs" (taken as they are: rows need not sum to one). Where the floating dtypes of labels and
            logits differ, both are promoted to their common one.
        label_kind: what ``labels`` holds.
        reduction: "mean" over the rows, "sum", or "none".
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu", "cuda"
            or "triton" (of the CPU's tensors in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        A scalar, or ``[N]`` for reduction "none"; in the dtype of logits, in float32 under autocast. The mean of no
        rows is NaN, as in torch.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit, or a class number is not in 0..K-1. There is no
            ``ignore_index``: -100 is out of range like any other. Class numbers are looked at on the CPU only, outside
            of ``vmap`` and ``torch.compile``; elsewhere one that is out of range makes its row's loss and gradient NaN.
        NotImplementedError: the backend cannot run here.
    """
    _check(logits, labels, label_kind, reduction)
    if label_kind != "hard":
        common = torch.promote_types(logits.dtype, labels.dtype)
        logits, labels = logits.to(common), labels.to(common)
    chosen = choose_backend("soft_cross_entropy", backend, logits.device, BACKENDS)
    if chosen == "reference":
        return widened(reference.soft_cross_entropy)(logits, labels, label_kind, reduction)
    loss = (_triton if chosen == "triton" else _native).forward(logits, labels, KINDS.index(label_kind))
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss if under_autocast(logits) else loss.to(logits.dtype)


def _check(logits: Tensor, labels: Tensor, label_kind: str, reduction: str) -> None:
    check_choice("label_kind", label_kind, KINDS)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    for name, tensor in (("logits", logits), ("labels", labels)):
        if name == "logits" or label_kind != "hard" or not isinstance(tensor, Tensor):
            check_floating(name, tensor)
        elif tensor.dtype != torch.int64:
            raise TypeError(f"labels: expected int64 class numbers for label_kind='hard', got {tensor.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [N, K] with at least one class, got shape {list(logits.shape)}")
    expected = logits.shape[:1] if label_kind == "hard" else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"labels: expected shape {list(expected)} for label_kind={label_kind!r} and logits {list(logits.shape)}, "
            f"got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected device {logits.device} as logits, got {labels.device}")
    if label_kind == "hard":
        check_class_numbers("labels", labels, logits.shape[1], "; ignore_index is not supported")


# In what follows, `saved` are an operator's tensors, `options` is (kind,).


def _forward_fake(logits: Tensor, labels: Tensor, kind: int) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits))


def _backward_fake(grad: Tensor, logits: Tensor, labels: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    N, K = logits.shape
    return logits.new_empty((N, K)), logits.new_empty((N, 0 if kind == HARD else K))


def _jvp_fake(logits: Tensor, labels: Tensor, logits_t: Tensor, labels_t: Tensor, kind: int) -> Tensor:
    return _forward_fake(logits, labels, kind)


def _backward_jvp_fake(
    grad: Tensor, grad_t: Tensor | None, logits: Tensor, labels: Tensor, logits_t: Tensor, labels_t: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_fake(logits, labels, kind), *_backward_fake(grad, logits, labels, kind)


def _direction(logits: Tensor, direction: tuple[Tensor, ...], kind: int) -> tuple[Tensor, Tensor]:
    """Hard labels' direction takes the shape [N, 0] however it comes: as the labels' or as their gradient's."""
    logits_t, labels_t = direction
    return logits_t, logits.new_empty((logits.shape[0], 0)) if kind == HARD else labels_t


def _differentiable(grads: tuple, kind: int) -> tuple:
    return (grads[0], None) if kind == HARD else tuple(grads)


class _Operators:
    """The operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "soft_cross_entropy",
            tensors=2,
            fake=_forward_fake,
            vjp=self._forward_vjp,
            jvp=self._forward_jvp,
            vmap=batch_into_rows(lambda *args: self.forward.raw(*args), 2),
            library=library,
        )
        self.backward: Operator = Operator(
            "soft_cross_entropy_backward",
            tensors=3,
            fake=_backward_fake,
            vjp=self._backward_vjp,
            jvp=self._backward_forward_jvp,
            vmap=batch_into_rows(lambda *args: self.backward.raw(*args), 3),
            library=library,
        )
        self.jvp: Operator = Operator(
            "soft_cross_entropy_jvp",
            tensors=4,
            fake=_jvp_fake,
            vjp=self._jvp_vjp,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.jvp.raw(*args), 4),
            library=library,
        )
        self.backward_jvp: Operator = Operator(
            "soft_cross_entropy_backward_jvp",
            tensors=6,
            fake=_backward_jvp_fake,
            vjp=None,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.backward_jvp.raw(*args), 6),
            library=library,
        )

    def _forward_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        return _differentiable(self.backward(grad, *saved, *options), *options)

    def _forward_jvp(self, saved: tuple, options: tuple, *direction: Tensor) -> Tensor:
        return self.jvp(*saved, *_direction(saved[0], direction, *options), *options)

    def _backward_vjp(self, saved: tuple, options: tuple, *direction: Tensor) -> tuple:
        grad, *inputs = saved
        along = _direction(inputs[0], direction, *options)
        to_grad, *to_inputs = self.backward_jvp(grad, None, *inputs, *along, *options)
        return to_grad, *_differentiable(to_inputs, *options)

    def _backward_forward_jvp(self, saved: tuple, options: tuple, grad_t: Tensor, *direction: Tensor) -> tuple:
        grad, *inputs = saved
        return self.backward_jvp(grad, grad_t, *inputs, *_direction(inputs[0], direction, *options), *options)[1:]

    def _jvp_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        inputs, direction = saved[:2], saved[2:]
        to_inputs = self.backward_jvp(grad, None, *inputs, *direction, *options)[1:]
        to_direction = self.backward(grad, *inputs, *options)  # jvp is linear in the direction
        return *_differentiable(to_inputs, *options), *_differentiable(to_direction, *options)


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import soft_cross_entropy as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "soft_cross_entropy", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "soft_cross_entropy_backward", _backward_fake, _triton_fill("backward"))
register_filled(_triton_library, "soft_cross_entropy_jvp", _jvp_fake, _triton_fill("jvp"))
register_filled(_triton_library, "soft_cross_entropy_backward_jvp", _backward_jvp_fake, _triton_fill("backward_jvp"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
