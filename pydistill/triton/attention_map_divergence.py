"""The divergence between two softmax attention maps, in Triton: rows, then the gradients of queries and keys.

`csrc/kernels/attention_map_divergence.h` says what is computed. Three kernels, each over tiles of scores that it
computes itself, so that nothing as large as a map is written:

    rows        a block of rows meets all keys: running maxima and sums give each row's statistics and its loss
    grad_q      a block of rows meets all keys:  grad_q = scale_s sum of dS k_s
    grad_k      a block of keys meets all rows:  grad_k = scale_s sum of dS^T q_s

Only one program writes each output, and its loop runs in order: no atomics, equal bits from run to run.

Scores are relative to their row's maximum, and the logarithm of a row's sum is kept beside the maximum: added to it,
the sum would be lost in the rounding of a large maximum.

Derivation of the running sums, with m the largest score so far: of fkl, the sum of e^(t - m_t) u with
u = (t - m_t) - (s - m_s) is carried over to new maxima as e^(m_t - m_t') (sum + (m_t - m_t' - m_s + m_s') total), where
total is the sum of e^(t - m_t); in the end loss = sum / total + log total_s - log total_t. Maxima only rise, so u
becomes large only where the loss is. A Jensen-Shannon divergence needs the totals first: a second loop.

Tiles are widened to float32 as they are loaded. Products of 16-bit types are exact in TF32 on NVIDIA's tensor cores;
the gradients' other factor is then rounded to its 11 bits, no fewer than the outputs have. Float32 is multiplied
as float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

FKL, RKL, JSD, CE = (tl.constexpr(i) for i in range(4))  # in the order of Kind in the header
INPUTS = ("q_s", "k_s", "q_t", "k_t", "mask")
STATISTICS = ("tops_s", "tops_t", "logs_s", "logs_t", "centre")  # of the rows
# score and maximum must be rounded alike before they are subtracted: no fused operation on the unrounded product
COMPILER = {"num_stages": 1, "enable_fp_fusion": False}
STRIDES = tuple(f"{name}_{axis}" for name in INPUTS for axis in "ahrc")


@triton.jit
def _tile(
    base, start, size, stride_r, stride_c, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # -> [ROWS, COLUMNS], zero where there is nothing
    r = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(base + r * stride_r + c * stride_c, mask=(r < size) & (c < width), other=0).to(tl.float32)


@triton.jit
def _live(
    mask, n, m, N, M, mask_r, mask_c, ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr
):  # -> [ROWS, KEYS]: which keys take part
    r = n + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = m + tl.arange(0, KEYS).to(tl.int64)[None, :]
    inside = (r < N) & (c < M)
    if HAS_MASK:
        return tl.load(mask + r * mask_r + c * mask_c, mask=inside, other=0) != 0
    else:
        return (r >= 0) & (c < M)


@triton.jit
def _of_mixture(p_t, log_p_t, p_s, log_p_s, beta):
    """The logarithms of p_t and of p_s over their mixture; 0 where the probability is 0, which does not count.

    In units of the larger probability, where the mixture is near one: by itself it may underflow.
    """
    more = p_t > p_s
    unit, log_unit = tl.where(more, p_t, p_s), tl.where(more, log_p_t, log_p_s)
    log_mix = tl.log(beta * (p_t / unit) + (1 - beta) * (p_s / unit))
    of_t = tl.where(p_t == 0, 0.0, (log_p_t - log_unit) - log_mix)
    of_s = tl.where(p_s == 0, 0.0, (log_p_s - log_unit) - log_mix)
    return of_t, of_s


@triton.jit
def _slope(s, t, live, top_s, top_t, log_s, log_t, centre, g, beta, KIND: tl.constexpr):
    """d loss/d s times g, [ROWS, KEYS]; the rest are columns [ROWS, 1]."""
    s, t = s - top_s, t - top_t
    p_s = tl.where(live, tl.exp(s - log_s), 0.0)
    if KIND == RKL:
        slope = p_s * (s - t - centre)
    elif KIND == JSD:
        p_t = tl.where(live, tl.exp(t - log_t), 0.0)
        _of_t, b = _of_mixture(p_t, t - log_t, p_s, s - log_s, beta)
        slope = (1 - beta) * p_s * (b - centre)
    else:
        slope = p_s - tl.where(live, tl.exp(t - log_t), 0.0)
    return tl.where(live, g * slope, 0.0)


@triton.jit(do_not_specialize=STRIDES)
def attention_map_divergence_rows_kernel(
    q_s, k_s, q_t, k_t, mask,  # [A, H, N or M, features], and [A, H, N, M] or None
    loss, tops_s, tops_t, logs_s, logs_t, centre,  # [A, H, N], contiguous
    H, N, M, width_s, width_t,
    q_s_a, q_s_h, q_s_r, q_s_c,
    k_s_a, k_s_h, k_s_r, k_s_c,
    q_t_a, q_t_h, q_t_r, q_t_c,
    k_t_a, k_t_h, k_t_r, k_t_c,
    mask_a, mask_h, mask_r, mask_c,
    scale_s, scale_t, beta,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH_S: tl.constexpr,  # powers of two, at least 16
    WIDTH_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_MASK: tl.constexpr = mask is not None
    blocks = tl.cdiv(N, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    a, h = group // H, group % H
    queries_s = _tile(q_s + a * q_s_a + h * q_s_h, n, N, q_s_r, q_s_c, width_s, WIDTH_S, ROWS)
    queries_t = _tile(q_t + a * q_t_a + h * q_t_h, n, N, q_t_r, q_t_c, width_t, WIDTH_T, ROWS)
    keys_s, keys_t = k_s + a * k_s_a + h * k_s_h, k_t + a * k_t_a + h * k_t_h
    mask_of = mask
    if HAS_MASK:
        mask_of = mask + a * mask_a + h * mask_h

    top_s = tl.full((ROWS,), float("-inf"), tl.float32)
    top_t = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_s = tl.zeros((ROWS,), tl.float32)
    sum_t = tl.zeros((ROWS,), tl.float32)
    sum_u = tl.zeros((ROWS,), tl.float32)
    for m in range(0, M, KEYS):
        live = _live(mask_of, n, m, N, M, mask_r, mask_c, ROWS, KEYS, HAS_MASK)
        block_s = _tile(keys_s, m, M, k_s_r, k_s_c, width_s, WIDTH_S, KEYS)
        block_t = _tile(keys_t, m, M, k_t_r, k_t_c, width_t, WIDTH_T, KEYS)
        s = scale_s * tl.dot(queries_s, tl.trans(block_s), input_precision=PRECISION)
        t = scale_t * tl.dot(queries_t, tl.trans(block_t), input_precision=PRECISION)
        s = tl.where(live, s, float("-inf"))
        t = tl.where(live, t, float("-inf"))
        new_s, new_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        # until a key takes part, the maximum is minus infinity, whose difference from itself is NaN
        from_s, from_t = tl.where(new_s == float("-inf"), 0.0, new_s), tl.where(new_t == float("-inf"), 0.0, new_t)
        s, t = s - from_s[:, None], t - from_t[:, None]
        down_s, down_t = top_s - from_s, top_t - from_t
        e_s, e_t, fade_s, fade_t = tl.exp(s), tl.exp(t), tl.exp(down_s), tl.exp(down_t)
        sum_s *= fade_s
        sum_t *= fade_t
        if KIND == RKL:
            weights, u, total, fade, down = e_s, s - t, sum_s, fade_s, down_s - down_t
        elif KIND == CE:
            weights, u, total, fade, down = e_t, -s, sum_t, fade_t, -down_s
        else:
            weights, u, total, fade, down = e_t, t - s, sum_t, fade_t, down_t - down_s
        sum_u = sum_u * fade + tl.where(total == 0, 0.0, total * down) + tl.sum(weights * tl.where(live, u, 0.0), 1)
        sum_s += tl.sum(e_s, 1)
        sum_t += tl.sum(e_t, 1)
        top_s, top_t = new_s, new_t
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)

    if KIND == FKL:
        middle = sum_u / sum_t
        rows = middle + (log_s - log_t)
    elif KIND == CE:
        middle = sum_u / sum_t
        rows = middle + log_s
    elif KIND == RKL:
        middle = sum_u / sum_s
        rows = middle + (log_t - log_s)
    else:
        sum_a = tl.zeros((ROWS,), tl.float32)
        middle = tl.zeros((ROWS,), tl.float32)
        for m in range(0, M, KEYS):
            live = _live(mask_of, n, m, N, M, mask_r, mask_c, ROWS, KEYS, HAS_MASK)
            block_s = _tile(keys_s, m, M, k_s_r, k_s_c, width_s, WIDTH_S, KEYS)
            block_t = _tile(keys_t, m, M, k_t_r, k_t_c, width_t, WIDTH_T, KEYS)
            s = scale_s * tl.dot(queries_s, tl.trans(block_s), input_precision=PRECISION)
            t = scale_t * tl.dot(queries_t, tl.trans(block_t), input_precision=PRECISION)
            s, t = (s - top_s[:, None]) - log_s[:, None], (t - top_t[:, None]) - log_t[:, None]
            p_s, p_t = tl.where(live, tl.exp(s), 0.0), tl.where(live, tl.exp(t), 0.0)
            of_t, of_s = _of_mixture(p_t, t, p_s, s, beta)
            sum_a += tl.sum(p_t * of_t, 1)
            middle += tl.sum(p_s * of_s, 1)
        rows = tl.where(sum_s == 0, float("nan"), beta * sum_a + (1 - beta) * middle)  # no key: no divergence either

    r = n + tl.arange(0, ROWS)
    at = group * N + r
    tl.store(loss + at, rows, mask=r < N)
    tl.store(tops_s + at, top_s, mask=r < N)
    tl.store(tops_t + at, top_t, mask=r < N)
    tl.store(logs_s + at, log_s, mask=r < N)
    tl.store(logs_t + at, log_t, mask=r < N)
    tl.store(centre + at, middle, mask=r < N)


@triton.jit
def _column(base, group, n, N, ROWS: tl.constexpr):  # -> [ROWS, 1]
    r = n + tl.arange(0, ROWS)
    return tl.load(base + group * N + r, mask=r < N, other=0)[:, None]


@triton.jit(do_not_specialize=STRIDES)
def attention_map_divergence_grad_q_kernel(
    q_s, k_s, q_t, k_t, mask,
    grad,  # [A, H, N], or None: ones
    tops_s, tops_t, logs_s, logs_t, centre,
    grad_q,  # [A, H, N, width_s], contiguous
    H, N, M, width_s, width_t,
    q_s_a, q_s_h, q_s_r, q_s_c,
    k_s_a, k_s_h, k_s_r, k_s_c,
    q_t_a, q_t_h, q_t_r, q_t_c,
    k_t_a, k_t_h, k_t_r, k_t_c,
    mask_a, mask_h, mask_r, mask_c,
    scale_s, scale_t, beta,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_MASK: tl.constexpr = mask is not None
    blocks = tl.cdiv(N, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    a, h = group // H, group % H
    queries_s = _tile(q_s + a * q_s_a + h * q_s_h, n, N, q_s_r, q_s_c, width_s, WIDTH_S, ROWS)
    queries_t = _tile(q_t + a * q_t_a + h * q_t_h, n, N, q_t_r, q_t_c, width_t, WIDTH_T, ROWS)
    keys_s, keys_t = k_s + a * k_s_a + h * k_s_h, k_t + a * k_t_a + h * k_t_h
    mask_of = mask
    if HAS_MASK:
        mask_of = mask + a * mask_a + h * mask_h
    top_s, top_t = _column(tops_s, group, n, N, ROWS), _column(tops_t, group, n, N, ROWS)
    log_s, log_t = _column(logs_s, group, n, N, ROWS), _column(logs_t, group, n, N, ROWS)
    middle = _column(centre, group, n, N, ROWS)
    g = tl.full((ROWS, 1), 1.0, tl.float32) if grad is None else _column(grad, group, n, N, ROWS)

    total = tl.zeros((ROWS, WIDTH_S), tl.float32)
    for m in range(0, M, KEYS):
        live = _live(mask_of, n, m, N, M, mask_r, mask_c, ROWS, KEYS, HAS_MASK)
        block_s = _tile(keys_s, m, M, k_s_r, k_s_c, width_s, WIDTH_S, KEYS)
        block_t = _tile(keys_t, m, M, k_t_r, k_t_c, width_t, WIDTH_T, KEYS)
        s = scale_s * tl.dot(queries_s, tl.trans(block_s), input_precision=PRECISION)
        t = scale_t * tl.dot(queries_t, tl.trans(block_t), input_precision=PRECISION)
        slope = _slope(s, t, live, top_s, top_t, log_s, log_t, middle, g, beta, KIND)
        total = tl.dot(slope, block_s, total, input_precision=PRECISION)
    r = n + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, WIDTH_S)[None, :]
    at = grad_q + (group * N + r) * width_s + c
    tl.store(at, (scale_s * total).to(grad_q.dtype.element_ty), mask=(r < N) & (c < width_s))


@triton.jit(do_not_specialize=STRIDES)
def attention_map_divergence_grad_k_kernel(
    q_s, k_s, q_t, k_t, mask,
    grad,  # [A, H, N], or None: ones
    tops_s, tops_t, logs_s, logs_t, centre,
    grad_k,  # [A, H, M, width_s], contiguous
    H, N, M, width_s, width_t,
    q_s_a, q_s_h, q_s_r, q_s_c,
    k_s_a, k_s_h, k_s_r, k_s_c,
    q_t_a, q_t_h, q_t_r, q_t_c,
    k_t_a, k_t_h, k_t_r, k_t_c,
    mask_a, mask_h, mask_r, mask_c,
    scale_s, scale_t, beta,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_MASK: tl.constexpr = mask is not None
    blocks = tl.cdiv(M, KEYS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks).to(tl.int64) * KEYS
    a, h = group // H, group % H
    rows_s, rows_t = q_s + a * q_s_a + h * q_s_h, q_t + a * q_t_a + h * q_t_h
    block_s = _tile(k_s + a * k_s_a + h * k_s_h, m, M, k_s_r, k_s_c, width_s, WIDTH_S, KEYS)
    block_t = _tile(k_t + a * k_t_a + h * k_t_h, m, M, k_t_r, k_t_c, width_t, WIDTH_T, KEYS)
    mask_of = mask
    if HAS_MASK:
        mask_of = mask + a * mask_a + h * mask_h

    total = tl.zeros((KEYS, WIDTH_S), tl.float32)
    for n in range(0, N, ROWS):
        live = _live(mask_of, n, m, N, M, mask_r, mask_c, ROWS, KEYS, HAS_MASK)
        queries_s = _tile(rows_s, n, N, q_s_r, q_s_c, width_s, WIDTH_S, ROWS)
        queries_t = _tile(rows_t, n, N, q_t_r, q_t_c, width_t, WIDTH_T, ROWS)
        s = scale_s * tl.dot(queries_s, tl.trans(block_s), input_precision=PRECISION)
        t = scale_t * tl.dot(queries_t, tl.trans(block_t), input_precision=PRECISION)
        top_s, top_t = _column(tops_s, group, n, N, ROWS), _column(tops_t, group, n, N, ROWS)
        log_s, log_t = _column(logs_s, group, n, N, ROWS), _column(logs_t, group, n, N, ROWS)
        middle = _column(centre, group, n, N, ROWS)
        g = tl.full((ROWS, 1), 1.0, tl.float32) if grad is None else _column(grad, group, n, N, ROWS)
        slope = _slope(s, t, live, top_s, top_t, log_s, log_t, middle, g, beta, KIND)
        total = tl.dot(tl.trans(slope), queries_s, total, input_precision=PRECISION)
    r = m + tl.arange(0, KEYS).to(tl.int64)[:, None]
    c = tl.arange(0, WIDTH_S)[None, :]
    at = grad_k + (group * M + r) * width_s + c
    tl.store(at, (scale_s * total).to(grad_k.dtype.element_ty), mask=(r < M) & (c < width_s))


@dataclass(frozen=True)
class Config:
    """How a launch divides its work; every field but ``num_warps`` is the kernels' argument of that name."""

    rows: int
    keys: int
    width_s: int
    width_t: int
    precision: str
    num_warps: int


def configure(q_s: Tensor, q_t: Tensor, hip: bool = False) -> Config:
    """Tiles that spill a few words at most; chosen by the compilers' reports, not yet timed on a GPU."""
    width_s, width_t = (max(16, triton.next_power_of_2(q.shape[-1])) for q in (q_s, q_t))
    wide = max(width_s, width_t) > 64
    # AMD's matrix cores multiply float32 as it is
    precision = "ieee" if hip or q_s.dtype == torch.float32 else "tf32"
    return Config(16 if wide else 32, 32, width_s, width_t, precision, 4 if hip else 8)


def arguments(tensors: dict[str, Tensor | None], config: Config, options: tuple) -> dict[str, Any]:
    """The arguments shared by all kernels, from the inputs by name; ``options``: (scale_s, scale_t, kind, beta)."""
    scale_s, scale_t, kind, beta = options
    q_s, k_s, q_t = tensors["q_s"], tensors["k_s"], tensors["q_t"]
    strides: dict[str, int] = dict.fromkeys(STRIDES, 0)
    for name in INPUTS:
        if (tensor := tensors[name]) is not None:
            strides |= {f"{name}_{axis}": stride for axis, stride in zip("ahrc", tensor.stride(), strict=True)}
    return {
        **{name: tensors[name] for name in INPUTS},
        **{"H": q_s.shape[1], "N": q_s.shape[2], "M": k_s.shape[2]},
        **{"width_s": q_s.shape[3], "width_t": q_t.shape[3]},
        **strides,
        **{"scale_s": scale_s, "scale_t": scale_t, "beta": beta, "KIND": kind},
        **{"ROWS": config.rows, "KEYS": config.keys, "WIDTH_S": config.width_s, "WIDTH_T": config.width_t},
        "PRECISION": config.precision,
    }


def _launch(
    inputs: tuple[Tensor | None, ...],
    options: tuple,
    grad: Tensor | None,
    loss: Tensor | None,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
) -> None:
    """Fill the outputs that are not None: each row's loss [A, H, N], and the gradients of <grad, losses>."""
    tensors = dict(zip(INPUTS, inputs, strict=True))
    q_s, k_s, q_t = tensors["q_s"], tensors["k_s"], tensors["q_t"]
    if tensors["mask"] is not None:
        tensors["mask"] = tensors["mask"].view(torch.uint8)
    A, H, N = q_s.shape[:3]
    if A * H * N == 0:
        for output in (grad_q, grad_k):
            if output is not None:
                output.zero_()
        return
    config = configure(q_s, q_t, torch.version.hip is not None)
    shared = arguments(tensors, config, options)
    row_blocks, key_blocks = A * H * triton.cdiv(N, config.rows), A * H * triton.cdiv(k_s.shape[2], config.keys)
    statistics = {name: q_s.new_empty((A, H, N), dtype=torch.float32) for name in STATISTICS}
    if loss is None:
        loss = torch.empty_like(statistics["centre"])
    options = {"num_warps": config.num_warps, **COMPILER}
    given = {**shared, **statistics, "loss": loss}
    run_programs(attention_map_divergence_rows_kernel, row_blocks, q_s.device, given, **options)
    given = {**shared, **statistics, "grad": None if grad is None else grad.contiguous()}
    if grad_q is not None:
        kernel = attention_map_divergence_grad_q_kernel
        run_programs(kernel, row_blocks, q_s.device, {**given, "grad_q": grad_q}, **options)
    if grad_k is not None:
        kernel = attention_map_divergence_grad_k_kernel
        run_programs(kernel, key_blocks, q_s.device, {**given, "grad_k": grad_k}, **options)


def forward(outputs: tuple[Tensor, ...], *args: Any) -> None:
    """Fills ``outputs`` with what the operator of this name returns for the other arguments; so does the next."""
    *inputs, scale_s, scale_t, kind, beta, summed, with_q, with_k = args
    loss, grad_q, grad_k = outputs
    rows = loss.new_empty(inputs[0].shape[:3]) if summed else loss
    options = (scale_s, scale_t, kind, beta)
    _launch(tuple(inputs), options, None, rows, grad_q if with_q else None, grad_k if with_k else None)
    if summed:
        loss.copy_(rows.sum(dtype=torch.float64))


def backward(outputs: tuple[Tensor, ...], grad: Tensor, *args: Any) -> None:
    *inputs, scale_s, scale_t, kind, beta, with_q, with_k = args
    grad_q, grad_k = outputs
    options = (scale_s, scale_t, kind, beta)
    _launch(tuple(inputs), options, grad, None, grad_q if with_q else None, grad_k if with_k else None)
