"""The divergence of student from teacher in Triton: all four forms (csrc/kernels/kd_divergence.h has their formulas).

A program owns a row and traverses it ``BLOCK`` classes at a time: for the maxima, for the sums of exponentials, for
sums over these, and for the outputs. Only the first time does a row come from memory, as it is small enough for the
cache. Float64 has no kernel: Triton passes numbers to kernels in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

FORMS = ("forward", "backward", "jvp", "backward_jvp")
MOST = 512  # classes at a time: four per thread, so that none of the forms spills registers
ROWS = ("student", "student_t", "target", "grad_logits")
_FKL, _RKL, _JSD, _SOFT_CE, _CE, _MSE, _OFA = (tl.constexpr(i) for i in range(7))  # as in kd_divergence.h


@triton.jit
def load_row(row, at, column, inside, FILL: tl.constexpr):
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(row + at * column, mask=inside, other=FILL).to(tl.float32)


@triton.jit
def softmax_row(row, column, C, factor, BLOCK: tl.constexpr):
    """The row's maximum, and the logarithm of the sum of exponentials of ``(row - maximum) * factor``."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        tops = tl.maximum(tops, load_row(row, at, column, at < C, float("-inf")))
    top = tl.max(tops, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        total += tl.exp((load_row(row, at, column, at < C, float("-inf")) - top) * factor)
    return top, tl.log(tl.sum(total, 0))


@triton.jit
def weighted(weight, x):
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def _target(row, column, at, inside, label, cold, top, log_sum, gamma, KIND: tl.constexpr, PROBS: tl.constexpr):
    """The target's probabilities (for ce and ofa the weights of -log q) and their logarithms."""
    if KIND == _CE:
        p = tl.where(at == label, 1.0, 0.0)
        log_p = p
    elif PROBS:
        p = load_row(row, at, column, inside, 0.0)
        log_p = tl.log(p)
    else:
        log_p = (load_row(row, at, column, inside, float("-inf")) - top) * cold - log_sum
        p = tl.exp(log_p)
    if KIND == _OFA:
        p = tl.where(at == label, _grown(p, gamma), tl.exp(gamma * log_p))  # p itself may have underflowed
        p = tl.where(inside, p, 0.0)
    return p, log_p


@triton.jit
def _grown(x, gamma):
    """``(1 + x)**gamma - 1``; log1p and expm1 by Kahan's corrections, as Triton has neither."""
    w = 1 + x
    y = gamma * tl.where(w == 1, x, tl.log(w) * (x / (w - 1)))
    e = tl.exp(y)
    return tl.where(e == 1, y, (e - 1) * (y / tl.log(e)))


@triton.jit
def _middle(p, log_p, q, log_q, beta):
    """The logarithms of p / m and of q / m, and (1 - beta) q / m, with m = beta p + (1 - beta) q.

    In units of the larger of p and q, where m is near one: by itself it may underflow. NaN where both are zero, which
    `weighted` ignores.
    """
    more = p > q
    unit, log_unit = tl.where(more, p, q), tl.where(more, log_p, log_q)
    share = (1 - beta) * (q / unit)
    m = beta * (p / unit) + share
    log_m = tl.log(m)
    return (log_p - log_unit) - log_m, (log_q - log_unit) - log_m, share / m


@triton.jit(do_not_specialize=("C", *(f"{name}_{way}" for name in ROWS for way in ("row", "column"))))
def kd_divergence_kernel(
    student, student_t, target, grad_logits,  # [N, C]; None if the form does not use it
    labels, grad, grad_t, loss,  # [N], contiguous
    student_row, student_t_row, target_row, grad_logits_row,
    student_column, student_t_column, target_column, grad_logits_column,
    C, cold, scale, ce_weight, beta, gamma,  # cold: 1 / T
    KIND: tl.constexpr, PROBS: tl.constexpr, HAS_CE: tl.constexpr, SECOND: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    student += n * student_row
    label = n * 0 - 1
    poison = 0.0
    if labels is not None:
        label = tl.load(labels + n)
        if HAS_CE or KIND == _CE or KIND == _OFA:  # noqa: SIM109 - Triton has no `in`
            poison = tl.where((label >= 0) & (label < C), 0.0, float("nan"))
    if target is not None:
        target += n * target_row
    if student_t is not None:
        student_t += n * student_t_row

    top, log_sum = softmax_row(student, student_column, C, cold, BLOCK)
    top_t, log_sum_t = top, log_sum
    if not PROBS and KIND != _CE and KIND != _MSE:
        top_t, log_sum_t = softmax_row(target, target_column, C, cold, BLOCK)
    top_1, log_sum_1 = top, log_sum
    if HAS_CE:
        top_1, log_sum_1 = softmax_row(student, student_column, C, 1.0, BLOCK)

    losses = tl.zeros((BLOCK,), tl.float32)
    entropies = tl.zeros((BLOCK,), tl.float32)
    masses = tl.zeros((BLOCK,), tl.float32)
    means = tl.zeros((BLOCK,), tl.float32)
    drifts = tl.zeros((BLOCK,), tl.float32)
    drifts_1 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + lanes
        inside = at < C
        x = load_row(student, at, student_column, inside, float("-inf"))
        log_q = (x - top) * cold - log_sum
        q = tl.exp(log_q)
        if KIND == _MSE:
            y = load_row(target, at, target_column, inside, 0.0)
            away = tl.where(inside, (x - y) * cold, 0.0)
            losses += away * away
        else:
            p, log_p = _target(target, target_column, at, inside, label, cold, top_t, log_sum_t, gamma, KIND, PROBS)
            masses += p
            if KIND == _FKL:
                losses += weighted(p, log_p - log_q)
            elif KIND == _RKL:
                means += weighted(q, log_q - log_p)
            elif KIND == _JSD:
                of_p, of_q, _share = _middle(p, log_p, q, log_q, beta)
                losses += beta * weighted(p, of_p)
                means += weighted(q, (1 - beta) * of_q)
            else:
                losses -= weighted(p, log_q)
        if HAS_CE:
            entropies -= tl.where(at == label, (x - top_1) - log_sum_1, 0.0)
        if SECOND:
            x_t = load_row(student_t, at, student_t_column, inside, 0.0)
            drifts += q * x_t
            if HAS_CE:
                drifts_1 += tl.exp((x - top_1) - log_sum_1) * x_t
    mean = tl.sum(means, 0)
    mass = tl.sum(masses, 0)
    drift = tl.sum(drifts, 0) * cold
    drift_1 = tl.sum(drifts_1, 0)
    found = scale * (tl.sum(losses, 0) + mean) + ce_weight * tl.sum(entropies, 0) + poison

    mean_t = 0.0
    if SECOND and (KIND == _RKL or KIND == _JSD):  # noqa: SIM109
        means = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lanes
            inside = at < C
            log_q = (load_row(student, at, student_column, inside, float("-inf")) - top) * cold - log_sum
            q = tl.exp(log_q)
            v = load_row(student_t, at, student_t_column, inside, 0.0) * cold - drift
            p, log_p = _target(target, target_column, at, inside, label, cold, top_t, log_sum_t, gamma, KIND, PROBS)
            if KIND == _RKL:
                means += weighted(q, v * (log_q - log_p) + v)
            else:
                _of_p, of_q, share = _middle(p, log_p, q, log_q, beta)
                means += weighted(q, v * ((1 - beta) * of_q) + (1 - beta) * v * (1 - share))
        mean_t = tl.sum(means, 0)

    if grad_logits is not None or student_t is not None:
        moved = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lanes
            inside = at < C
            x = load_row(student, at, student_column, inside, float("-inf"))
            log_q = (x - top) * cold - log_sum
            q = tl.exp(log_q)
            x_t = tl.zeros((BLOCK,), tl.float32)
            if student_t is not None:
                x_t = load_row(student_t, at, student_t_column, inside, 0.0)
            v = x_t * cold - drift
            h = tl.zeros((BLOCK,), tl.float32)
            if KIND == _MSE:
                g = 2 * tl.where(inside, (x - load_row(target, at, target_column, inside, 0.0)) * cold, 0.0)
                h = 2 * x_t * cold
            else:
                p, log_p = _target(target, target_column, at, inside, label, cold, top_t, log_sum_t, gamma, KIND, PROBS)
                if KIND == _RKL:
                    a = log_q - log_p
                    g = weighted(q, a - mean)
                    h = weighted(q, v * (a - mean) + v - mean_t)
                elif KIND == _JSD:
                    _of_p, of_q, share = _middle(p, log_p, q, log_q, beta)
                    a = (1 - beta) * of_q
                    g = weighted(q, a - mean)
                    h = weighted(q, v * (a - mean) + (1 - beta) * v * (1 - share) - mean_t)
                else:
                    g = mass * q - p
                    h = mass * (q * v)
            g = scale * cold * g + poison
            h = scale * cold * h + poison
            if HAS_CE:
                q_1 = tl.exp((x - top_1) - log_sum_1)
                g += ce_weight * (q_1 - tl.where(at == label, 1.0, 0.0))
                h += ce_weight * (q_1 * (x_t - drift_1))
            moved += tl.where(inside, g * x_t, 0.0)
            if grad_logits is not None:
                out = g
                if grad is not None:
                    if SECOND:
                        out = tl.load(grad + n) * h
                        if grad_t is not None:
                            out += tl.load(grad_t + n) * g
                    else:
                        out = tl.load(grad + n) * g
                to = grad_logits + n * grad_logits_row + at * grad_logits_column
                tl.store(to, out.to(grad_logits.dtype.element_ty), mask=inside)
        if student_t is not None:
            found = tl.sum(moved, 0)
    if loss is not None:
        tl.store(loss + n, found)


def arguments(tensors: dict[str, Tensor], options: tuple) -> dict[str, Any]:
    """The kernel's arguments, from tensors named like them and the operators' options."""
    kind, probs, T, scale, ce_weight, beta, gamma = options
    C = tensors["student"].shape[1]
    strides = {
        f"{name}_{way}": tensors[name].stride(i) if name in tensors else 0
        for i, way in enumerate(("row", "column"))
        for name in ROWS
    }
    return {
        **{name: tensors.get(name) for name in (*ROWS, "labels", "grad", "grad_t", "loss")},
        **strides,
        **{"C": C, "cold": 1 / T, "scale": scale, "ce_weight": float(ce_weight), "beta": beta, "gamma": gamma},
        **{"KIND": kind, "PROBS": probs, "HAS_CE": ce_weight != 0},
        "SECOND": "student_t" in tensors and "grad" in tensors,
        "BLOCK": min(MOST, max(32, triton.next_power_of_2(C))),
    }


def launch(tensors: dict[str, Tensor | None], options: tuple) -> None:
    """Fills loss and grad_logits if given; the form follows from ``grad`` and ``student_t``."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name in ("labels", "grad", "grad_t"):
        if name in present:
            present[name] = present[name].contiguous()
    student = present["student"]
    if student.dtype == torch.float64:
        raise NotImplementedError("kd_divergence: backend='triton' has no kernel for float64, got a float64 tensor")
    given = arguments(present, options)
    run_programs(kd_divergence_kernel, len(student), student.device, given, num_warps=4, enable_fp_fusion=False)


def forward(
    outputs: tuple[Tensor, Tensor], student: Tensor, target: Tensor | None, labels: Tensor | None, *options: Any
) -> None:
    """Fills ``outputs`` with what the operator of this name returns for the other arguments; so do the next three."""
    loss, kept = outputs
    *options, keep = options
    tensors = {"student": student, "target": target, "labels": labels, "loss": loss}
    launch(tensors | {"grad_logits": kept if keep else None}, tuple(options))


def backward(
    grad_logits: Tensor, grad: Tensor, student: Tensor, target: Tensor | None, labels: Tensor | None, *options: Any
) -> None:
    tensors = {"student": student, "target": target, "labels": labels, "grad": grad, "grad_logits": grad_logits}
    launch(tensors, options)


def jvp(
    loss: Tensor, student: Tensor, target: Tensor | None, labels: Tensor | None, student_t: Tensor, *options: Any
) -> None:
    tensors = {"student": student, "target": target, "labels": labels, "student_t": student_t, "loss": loss}
    launch(tensors, options)


def backward_jvp(
    outputs: tuple[Tensor, Tensor], grad: Tensor, grad_t: Tensor | None, student: Tensor, target: Tensor | None,
    labels: Tensor | None, student_t: Tensor, *options: Any,
) -> None:  # fmt: skip
    loss, grad_logits = outputs
    tensors = {"student": student, "target": target, "labels": labels, "student_t": student_t, "loss": loss}
    launch(tensors | {"grad": grad, "grad_t": grad_t, "grad_logits": grad_logits}, options)
