"""Loss of logits against a teacher's distribution of which k classes per row are stored, without densifying it.

Two operators on logits [N, C], with f the rows' losses:

    forward    f, and its gradient in each row if it will be needed
    backward   <grad, f>'s gradient

The first backward pass through a graph scales the kept gradient in place; a second one recomputes it. They exist
twice: in C++ (``torch.ops.pydistill``) and in Triton (``torch.ops.pydistill_triton``). Only the first derivative has a
formula; a second is refused.
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
TAILS = ("smooth", "zeros", "renorm")  # in the order of Tail in csrc/kernels/sparse_label_loss.h
SUM_TOLERANCE = 1e-2  # what fp16 or 8-bit probabilities may sum to above one


def sparse_label_loss(
    logits: Tensor,
    indices: Tensor,
    values: Tensor,
    *,
    T: float = 1.0,
    tail: Literal["smooth", "zeros", "renorm"] = "smooth",
    step: float | None = None,
    kind: Literal["kl", "ce"] = "kl",
    scale_T2: bool = False,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """Divergence of ``softmax(logits / T)`` from a distribution that stores k classes per row, in the stored form.

    Equivalent to ``kd_divergence(logits, densified, kind="fkl", T=T, target_is="probs", scale_T2=scale_T2)``, or
    "soft_ce", with the ``[N, C]`` target that is never made. The stored form is the "smooth" one of "Reinforce Data,
    Multiply Impact" (Faghri et al., ICCV 2023), in 8 bits per probability or in floating point.

    The gradient goes to ``logits``. It is computed in the forward pass; the first backward pass only scales it. A
    second derivative raises ``NotImplementedError``, and so does forward mode. On the CPU, results have equal bits
    across runs, thread counts and instruction sets. NaN and Inf propagate. A logit of -inf removes a class of zero
    probability; otherwise the loss is infinite, as for all unstored classes under "smooth".

    Args:
        logits: ``[N, C]`` with C >= 1; float32, float64, bfloat16 or float16, any strides. All arithmetic is in float32
            (float64 for float64).
        indices: the k stored classes of each row, ``[N, k]`` of any integer dtype, 1 <= k <= C, without duplicates.
        values: their probabilities at temperature T, ``[N, k]`` floating; or uint8 codes of
            ``exp(-code * step)``.
        T: divisor of the logits; above zero.
        tail: the probability of the other C - k classes: "smooth", an equal share of ``1 - sum values`` (none if that
            is negative); "zeros", none; "renorm", none, and the values are divided by their sum.
        step: of the codes; above zero, and None for floating values.
        kind: "kl" or, without the target's entropy, "ce". Their gradients are the same.
        scale_T2: multiply the loss by ``T**2``.
        reduction: "batchmean" (over the rows), "sum" or "none".
        backend: "auto" (the device's kernel: C++ on the CPU, Triton on GPUs), "reference" (plain torch, any device),
            "cpu", or "triton" (not in float64; the CPU in Triton's interpreter, TRITON_INTERPRET=1).

    Returns:
        A scalar, or ``[N]`` for reduction "none"; in the dtype of logits, in float32 under autocast. The mean of no
        rows is NaN, as in torch.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit, or the values require a gradient. On the CPU, outside of
            ``vmap`` and ``torch.compile``: a class number is not in 0..C-1, or values sum to more than one. Elsewhere a
            class number out of range makes its row NaN. A class that a row names twice makes it NaN everywhere.
        NotImplementedError: the backend cannot run here, or a second derivative is asked for.
    """
    _check_options(T, tail, step, kind, reduction)
    _check_tensors(logits, indices, values, step)
    _check_values(logits, indices, values, step, tail)
    return of_checked(logits, indices, values, T, tail, step, kind, scale_T2, reduction, backend)


def of_checked(
    logits: Tensor,
    indices: Tensor,
    values: Tensor,
    T: float,
    tail: Literal["smooth", "zeros", "renorm"] = "smooth",
    step: float | None = None,
    kind: Literal["kl", "ce"] = "kl",
    scale_T2: bool = False,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """`sparse_label_loss` of arguments known to fit, such as a store's decoded labels: checks cost as much again."""
    chosen = choose_backend("sparse_label_loss", backend, logits.device, BACKENDS)
    if chosen == "reference":
        return widened(reference.sparse_label_loss)(logits, indices, values, T, tail, step, kind, scale_T2, reduction)
    if chosen == "triton" and logits.dtype == torch.float64:
        raise NotImplementedError(
            "sparse_label_loss: backend='triton' has no kernel for float64; backend='reference' runs anywhere"
        )
    if step is None:
        values = values.to(compute_dtype(logits))
    keep = torch.is_grad_enabled() and logits.requires_grad
    scale = float(T**2 if scale_T2 else 1.0)
    if reduction == "batchmean" and keep and len(logits):  # so that gradients are kept at their final scale
        scale, reduction = scale / len(logits), "sum"
    options = (float(T), TAILS.index(tail), float(step or 0.0), kind == "kl", scale, keep)
    loss = (_triton if chosen == "triton" else _native).forward(logits, indices.to(torch.int64), values, *options)[0]
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.mean()
    return loss if under_autocast(logits) else loss.to(logits.dtype)


def _check_options(T: float, tail: str, step: float | None, kind: str, reduction: str) -> None:
    check_choice("tail", tail, TAILS)
    check_choice("kind", kind, ("kl", "ce"))
    check_choice("reduction", reduction, ("batchmean", "sum", "none"))
    for name, value in (("T", T), ("step", step)):
        positive = isinstance(value, int | float) and math.isfinite(value) and value > 0
        if not (positive or (name == "step" and value is None)):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def _check_tensors(logits: Tensor, indices: Tensor, values: Tensor, step: float | None) -> None:
    check_floating("logits", logits)
    for name, tensor in (("indices", indices), ("values", values)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices: expected integers, got {indices.dtype}")
    if step is not None and values.dtype != torch.uint8:
        raise TypeError(f"values: expected uint8 codes where a step is given, got {values.dtype}")
    if step is None:
        if values.dtype == torch.uint8:
            raise ValueError("step: expected that of the codes in values, which are uint8, got None")
        check_floating("values", values)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [N, C] with at least one class, got shape {list(logits.shape)}")
    N, C = logits.shape
    if indices.dim() != 2 or indices.shape[0] != N or not 1 <= indices.shape[1] <= C:
        raise ValueError(f"indices: expected [{N}, k] with k in 1..{C} for {C} classes, got {list(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(f"values: expected shape {list(indices.shape)} as indices, got {list(values.shape)}")
    for name, tensor in (("indices", indices), ("values", values)):
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device} as logits, got {tensor.device}")
    if torch.is_grad_enabled() and values.requires_grad:
        raise ValueError(
            "values: expected a teacher without gradient, got a tensor that requires one; pass values.detach()"
        )


def _check_values(logits: Tensor, indices: Tensor, values: Tensor, step: float | None, tail: str) -> None:
    check_class_numbers("indices", indices, logits.shape[1])
    if step is None and tail != "renorm":
        _check_sums(values)


def _check_sums(values: Tensor) -> None:
    if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
        return
    try:
        largest = float(values.sum(1, dtype=torch.float64).amax())
    except RuntimeError:  # the values of fake tensors and those under vmap are not accessible
        return
    if largest > 1 + SUM_TOLERANCE:
        raise ValueError(f"values: expected probabilities, which sum to at most 1 in a row, got a sum of {largest:.6g}")


# In every formula below: `saved` are the operator's tensors, `options` are (T, tail, step, entropy, scale, keep).


def _forward_fake(logits: Tensor, indices: Tensor, values: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    N, C = logits.shape
    return logits.new_empty((N,), dtype=compute_dtype(logits)), logits.new_empty((N, C if options[-1] else 0))


def _backward_fake(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(tuple(logits.shape))


class _Operators:
    """The operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "sparse_label_loss",
            tensors=3,
            fake=_forward_fake,
            vjp=self._vjp,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.forward.raw(*args), 3),
            kept=1,
            differentiable="once",
            library=library,
        )
        self.backward: Operator = Operator(
            "sparse_label_loss_backward",
            tensors=4,
            fake=_backward_fake,
            vjp=None,
            jvp=None,
            vmap=batch_into_rows(lambda *args: self.backward.raw(*args), 4),
            differentiable="once",
            library=library,
        )

    def _vjp(self, saved: tuple, options: tuple, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:  # no gradient reaches the loss
            return None, None, None
        *inputs, kept = saved
        *rest, keep = options
        scaled = scale_kept(ctx, kept, grad) if keep else None
        return self.backward(grad, *inputs, *rest) if scaled is None else scaled, None, None


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import sparse_label_loss as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "sparse_label_loss", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "sparse_label_loss_backward", _backward_fake, _triton_fill("backward"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
