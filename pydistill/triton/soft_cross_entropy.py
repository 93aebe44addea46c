"""The soft-label cross entropy in Triton: all four forms (csrc/kernels/soft_cross_entropy.h has their formulas).

A program owns a row and traverses it ``BLOCK`` classes at a time, once for each pass; after the first it comes from the
cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

FORMS = ("forward", "backward", "jvp", "backward_jvp")
ROWS = ("logits", "logits_t", "labels", "labels_t")
MOST = 512  # classes at a time, of float64 half as many: four per thread, so that none of the forms spills registers
_HARD, _LOGITS, _PROBS = (tl.constexpr(i) for i in range(3))  # as in soft_cross_entropy.h


@triton.jit
def _load(row, at, column, inside, FILL: tl.constexpr, COMPUTE: tl.constexpr):
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(row + at * column, mask=inside, other=FILL).to(COMPUTE)


@triton.jit
def _target(labels, at, column, inside, label, off, top, total, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    if KIND == _HARD:
        return tl.where(at == label, 1.0, off)
    elif KIND == _PROBS:
        return _load(labels, at, column, inside, 0.0, COMPUTE)
    else:
        return tl.exp(_load(labels, at, column, inside, float("-inf"), COMPUTE) - top) / total


@triton.jit
def _weighted(weight, x):
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit(do_not_specialize=("K", *(f"{name}_{way}" for name in ROWS for way in ("row", "column"))))
def soft_cross_entropy_kernel(
    logits, logits_t, labels, labels_t,  # [N, K], hard labels [N]; None if the form does not use it
    grad, grad_t, loss,  # [N], contiguous
    grad_logits, grad_labels,  # [N, K], contiguous
    logits_row, logits_t_row, labels_row, labels_t_row,
    logits_column, logits_t_column, labels_column, labels_t_column,
    K,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    TANGENTS: tl.constexpr = logits_t is not None
    NONE: tl.constexpr = float("-inf")
    n = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    nothing = tl.zeros((BLOCK,), COMPUTE)
    logits += n * logits_row
    labels += n * labels_row
    if TANGENTS:
        logits_t += n * logits_t_row
    if labels_t is not None:
        labels_t += n * labels_t_row
    label = n * 0
    off = tl.sum(nothing, 0)
    if KIND == _HARD:
        label = tl.load(labels)
        off = tl.where((label >= 0) & (label < K), off, float("nan"))

    tops = nothing + NONE
    tops_labels = nothing + NONE
    for start in range(0, K, BLOCK):
        at = start + lanes
        tops = tl.maximum(tops, _load(logits, at, logits_column, at < K, NONE, COMPUTE))
        if KIND == _LOGITS:
            tops_labels = tl.maximum(tops_labels, _load(labels, at, labels_column, at < K, NONE, COMPUTE))
    top, top_labels = tl.max(tops, 0), tl.max(tops_labels, 0)

    totals = nothing
    totals_labels = nothing
    for start in range(0, K, BLOCK):
        at = start + lanes
        totals += tl.exp(_load(logits, at, logits_column, at < K, NONE, COMPUTE) - top)
        if KIND == _LOGITS:
            totals_labels += tl.exp(_load(labels, at, labels_column, at < K, NONE, COMPUTE) - top_labels)
        elif KIND == _PROBS:
            totals_labels += _load(labels, at, labels_column, at < K, 0.0, COMPUTE)
    total, total_labels = tl.sum(totals, 0), tl.sum(totals_labels, 0)
    log_total = tl.log(total)

    losses = nothing
    shifts = nothing  # <P, logits_t>
    moves = nothing  # <t, labels_t>, or for probs the sum of labels_t
    for start in range(0, K, BLOCK):
        at = start + lanes
        inside = at < K
        l = _load(logits, at, logits_column, inside, NONE, COMPUTE) - top  # noqa: E741
        t = _target(labels, at, labels_column, inside, label, off, top_labels, total_labels, KIND, COMPUTE)
        # a class with zero probability on both sides takes no part: its u counts as a constant 0
        out = (t == 0) & (l == NONE)
        losses += _weighted(t, tl.where(out, 0.0, log_total - l))
        if TANGENTS:
            shifts += tl.exp(l) / total * _load(logits_t, at, logits_t_column, inside, 0.0, COMPUTE)
            if KIND != _HARD:
                along = _load(labels_t, at, labels_t_column, inside, 0.0, COMPUTE)
                moves += tl.where(out, 0.0, along if KIND == _PROBS else t * along)
    result = tl.sum(losses, 0)
    a, b = tl.sum(shifts, 0), tl.sum(moves, 0)

    found = result
    if TANGENTS:
        losses = nothing
        for start in range(0, K, BLOCK):
            at = start + lanes
            inside = at < K
            l = _load(logits, at, logits_column, inside, NONE, COMPUTE) - top  # noqa: E741
            t = _target(labels, at, labels_column, inside, label, off, top_labels, total_labels, KIND, COMPUTE)
            out = (t == 0) & (l == NONE)
            losses += _weighted(t, a - _load(logits_t, at, logits_t_column, inside, 0.0, COMPUTE))
            if KIND != _HARD:
                along = _load(labels_t, at, labels_t_column, inside, 0.0, COMPUTE)
                t_t = tl.where(out, 0.0, along if KIND == _PROBS else t * (along - b))
                losses += _weighted(t_t, tl.where(out, 0.0, log_total - l))
        found = tl.sum(losses, 0)
    if loss is not None:
        tl.store(loss + n, found)

    if grad is not None:
        g = tl.load(grad + n)
        s = total_labels if KIND == _PROBS else off * 0 + 1
        s_t = b if KIND == _PROBS else off * 0
        for start in range(0, K, BLOCK):
            at = start + lanes
            inside = at < K
            l = _load(logits, at, logits_column, inside, NONE, COMPUTE) - top  # noqa: E741
            p = tl.exp(l) / total
            t = _target(labels, at, labels_column, inside, label, off, top_labels, total_labels, KIND, COMPUTE)
            out = (t == 0) & (l == NONE)
            u = tl.where(out, 0.0, log_total - l)
            first_logits = s * p - t
            first_labels = u if KIND == _PROBS else t * (u - result)
            to_logits = g * first_logits
            to_labels = g * first_labels
            if TANGENTS:
                u_t = tl.where(out, 0.0, a - _load(logits_t, at, logits_t_column, inside, 0.0, COMPUTE))
                t_t = nothing
                if KIND != _HARD:
                    along = _load(labels_t, at, labels_t_column, inside, 0.0, COMPUTE)
                    t_t = tl.where(out, 0.0, along if KIND == _PROBS else t * (along - b))
                to_logits = g * (s_t * p - s * (p * u_t) - t_t)
                to_labels = g * (u_t if KIND == _PROBS else t_t * (u - result) + t * (u_t - found))
                if grad_t is not None:
                    g_t = tl.load(grad_t + n)
                    to_logits += g_t * first_logits
                    to_labels += g_t * first_labels
            tl.store(grad_logits + n * K + at, to_logits.to(grad_logits.dtype.element_ty), mask=inside)
            if KIND != _HARD:
                tl.store(grad_labels + n * K + at, to_labels.to(grad_labels.dtype.element_ty), mask=inside)


def arguments(tensors: dict[str, Tensor], kind: int) -> dict[str, Any]:
    """The kernel's arguments, from tensors named like them and the operators' option."""
    logits = tensors["logits"]
    K, most = logits.shape[1], MOST // 2 if logits.dtype == torch.float64 else MOST
    strides = {
        f"{name}_{way}": tensors[name].stride(i) if name in tensors and i < tensors[name].dim() else 0
        for i, way in enumerate(("row", "column"))
        for name in ROWS
    }
    names = (*ROWS, "grad", "grad_t", "loss", "grad_logits", "grad_labels")
    return {
        **{name: tensors.get(name) for name in names},
        **strides,
        **{"K": K, "KIND": kind, "BLOCK": min(most, max(32, triton.next_power_of_2(K)))},
    }


def launch(tensors: dict[str, Tensor | None], kind: int) -> None:
    """Fills those of loss, grad_logits and grad_labels that are given; the form follows from grad and logits_t."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if kind == _HARD.value:  # of hard labels there are no derivatives, and no direction is looked at
        present = {name: tensor for name, tensor in present.items() if name not in ("labels_t", "grad_labels")}
    for name in ("grad", "grad_t"):
        if name in present:
            present[name] = present[name].contiguous()
    logits = present["logits"]
    given = arguments(present, kind)
    run_programs(soft_cross_entropy_kernel, len(logits), logits.device, given, num_warps=4, enable_fp_fusion=False)


def forward(loss: Tensor, logits: Tensor, labels: Tensor, kind: int) -> None:
    """Fills ``loss`` with what the operator of this name returns for the other arguments; so do the next three."""
    launch({"logits": logits, "labels": labels, "loss": loss}, kind)


def backward(outputs: tuple[Tensor, Tensor], grad: Tensor, logits: Tensor, labels: Tensor, kind: int) -> None:
    grad_logits, grad_labels = outputs
    tensors = {"logits": logits, "labels": labels, "grad": grad}
    launch(tensors | {"grad_logits": grad_logits, "grad_labels": grad_labels}, kind)


def jvp(loss: Tensor, logits: Tensor, labels: Tensor, logits_t: Tensor, labels_t: Tensor, kind: int) -> None:
    tensors = {"logits": logits, "labels": labels, "logits_t": logits_t, "labels_t": labels_t}
    launch(tensors | {"loss": loss}, kind)


def backward_jvp(
    outputs: tuple[Tensor, Tensor, Tensor], grad: Tensor, grad_t: Tensor | None, logits: Tensor, labels: Tensor,
    logits_t: Tensor, labels_t: Tensor, kind: int,
) -> None:  # fmt: skip
    loss, grad_logits, grad_labels = outputs
    tensors = {"logits": logits, "labels": labels, "logits_t": logits_t, "labels_t": labels_t}
    tensors |= {"grad": grad, "grad_t": grad_t}
    launch(tensors | {"loss": loss, "grad_logits": grad_logits, "grad_labels": grad_labels}, kind)
