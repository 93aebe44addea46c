"""The loss against stored classes in Triton: both forms (csrc/kernels/sparse_label_loss.h has their formulas).

A program owns a row and traverses its logits ``BLOCK`` classes at a time, comparing them with each of the k stored
classes: so nothing is gathered or scattered, at a cost that grows with k C. Float64 has no kernel: Triton passes
numbers to kernels in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs
from pydistill.triton.kd_divergence import load_row, softmax_row, weighted

MOST = 512  # classes at a time
_SMOOTH, _RENORM = tl.constexpr(0), tl.constexpr(2)  # as in sparse_label_loss.h


@triton.jit
def _stored(values, j, column, step, CODES: tl.constexpr):
    value = tl.load(values + j * column)
    return tl.exp(-step * value.to(tl.float32)) if CODES else value.to(tl.float32)


@triton.jit(
    do_not_specialize=(
        *("logits_row", "logits_column", "indices_row", "indices_column", "values_row", "values_column"),
        *("grad_logits_row", "grad_logits_column", "C", "k"),
    )
)
def sparse_label_loss_kernel(
    logits, grad_logits,  # [N, C]; None if the form does not use it
    indices, values,  # [N, k]
    grad, loss,  # [N], contiguous
    logits_row, logits_column, indices_row, indices_column, values_row, values_column,
    grad_logits_row, grad_logits_column,
    C, k, cold, step, scale,  # cold: 1 / T
    TAIL: tl.constexpr, CODES: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    logits += n * logits_row
    indices += n * indices_row
    values += n * values_row

    top, log_sum = softmax_row(logits, logits_column, C, cold, BLOCK)
    total = 0.0
    for j in range(0, k):
        total += _stored(values, j, values_column, step, CODES)
    divisor, mass, u = 1.0, total, 0.0
    if TAIL == _RENORM:
        divisor, mass = total, 1.0
    elif TAIL == _SMOOTH:
        # NaN is not >= 1, so it stays
        u = tl.where(k < C, tl.where(total >= 1, 0.0, 1 - total) / tl.maximum(C - k, 1).to(tl.float32), 0.0)
        mass = total + u * (C - k)

    losses = tl.zeros((BLOCK,), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    met = tl.zeros((BLOCK,), tl.int32)
    twice = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        inside = at < C
        log_q = (load_row(logits, at, logits_column, inside, float("-inf")) - top) * cold - log_sum
        here = tl.zeros((BLOCK,), tl.int32)
        for j in range(0, k):
            p = _stored(values, j, values_column, step, CODES) / divisor
            same = (at == tl.load(indices + j * indices_column)) & inside
            log_p = 0.0
            if ENTROPY:
                log_p = tl.log(p)
            losses += tl.where(same, weighted(p, log_p - log_q), 0.0)
            here += same.to(tl.int32)
        others += tl.where(inside & (here == 0), log_q, 0.0)
        met += here
        twice += (here > 1).to(tl.int32)
    bad = (tl.sum(met, 0) != k) | (tl.sum(twice, 0) != 0)
    poison = tl.where(bad, float("nan"), 0.0)

    if loss is not None:
        tail = -tl.sum(others, 0)
        if ENTROPY:
            tail += (C - k) * tl.log(u)
        found = tl.sum(losses, 0) + tl.where(u == 0, 0.0, u * tail)
        tl.store(loss + n, scale * found + poison)
    if grad_logits is not None:
        factor = scale * cold
        if grad is not None:
            factor *= tl.load(grad + n)
        for start in range(0, C, BLOCK):
            at = start + lanes
            inside = at < C
            q = tl.exp((load_row(logits, at, logits_column, inside, float("-inf")) - top) * cold - log_sum)
            target = tl.zeros((BLOCK,), tl.float32) + u
            for j in range(0, k):
                p = _stored(values, j, values_column, step, CODES) / divisor
                target = tl.where(at == tl.load(indices + j * indices_column), p, target)
            to = grad_logits + n * grad_logits_row + at * grad_logits_column
            out = factor * (mass * q - target) + poison
            tl.store(to, out.to(grad_logits.dtype.element_ty), mask=inside)


def arguments(tensors: dict[str, Tensor], options: tuple) -> dict[str, Any]:
    """The kernel's arguments, from tensors named like them and the operators' options."""
    T, tail, step, entropy, scale = options
    C, k = tensors["logits"].shape[1], tensors["indices"].shape[1]
    strides = {
        f"{name}_{way}": tensors[name].stride(i) if name in tensors else 0
        for i, way in enumerate(("row", "column"))
        for name in ("logits", "indices", "values", "grad_logits")
    }
    return {
        **{name: tensors.get(name) for name in ("logits", "grad_logits", "indices", "values", "grad", "loss")},
        **strides,
        **{"C": C, "k": k, "cold": 1 / T, "step": float(step), "scale": float(scale)},
        **{"TAIL": tail, "CODES": tensors["values"].dtype == torch.uint8, "ENTROPY": entropy},
        "BLOCK": min(MOST, max(32, triton.next_power_of_2(C))),
    }


def launch(tensors: dict[str, Tensor], options: tuple) -> None:
    """Fills loss and grad_logits if given; ``grad`` is for the backward pass."""
    logits = tensors["logits"]
    if logits.dtype == torch.float64:
        raise NotImplementedError("sparse_label_loss: backend='triton' has no kernel for float64, got a float64 tensor")
    given = arguments(tensors, options)
    run_programs(sparse_label_loss_kernel, len(logits), logits.device, given, num_warps=4, enable_fp_fusion=False)


def forward(outputs: tuple[Tensor, Tensor], logits: Tensor, indices: Tensor, values: Tensor, *options: Any) -> None:
    """Fills ``outputs`` with what the operator of this name returns for the other arguments; so does the next."""
    loss, kept = outputs
    *options, keep = options
    tensors = {"logits": logits, "indices": indices, "values": values, "loss": loss}
    launch(tensors | ({"grad_logits": kept} if keep else {}), tuple(options))


def backward(grad_logits: Tensor, grad: Tensor, logits: Tensor, indices: Tensor, values: Tensor, *options: Any) -> None:
    tensors = {"logits": logits, "indices": indices, "values": values, "grad_logits": grad_logits}
    launch(tensors | {"grad": grad.contiguous()}, options)
