"""Triton kernels of `pydistill.ops.attention_map`: for NVIDIA and AMD GPUs, and for Triton's interpreter."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

BLOCK = 128  # positions, or channels, that a program processes at a time
ROWS = 8  # rows of the other index that it sums in registers


@triton.jit
def _derivative(x, EXPONENT: tl.constexpr, COEFFICIENT: tl.constexpr, ORDER: tl.constexpr):
    """The ORDER-th derivative of |x|^p: COEFFICIENT |x|^EXPONENT, up to the sign."""
    magnitude = tl.abs(x)
    if EXPONENT == 0:
        value = magnitude * 0 + 1
    elif EXPONENT == 1:
        value = magnitude
    elif EXPONENT == 2:
        value = magnitude * magnitude
    elif EXPONENT == 3:
        value = magnitude * magnitude * magnitude
    elif EXPONENT == 4:
        square = magnitude * magnitude
        value = square * square
    else:
        value = tl.where(magnitude == 0, 0.0, tl.exp(EXPONENT * tl.log(magnitude)))
    if ORDER > 0:
        value = tl.where(magnitude == 0, 0.0, value * COEFFICIENT)
    if ORDER % 2 == 1:
        value = tl.where(x < 0, -value, value)
    return value


@triton.jit
def _load(pointer, offset, mask):
    value = tl.load(pointer + offset, mask=mask, other=0.0)
    return value if value.dtype == tl.float64 else value.to(tl.float32)  # immediately: bf16 is for storage only


@triton.jit
def attention_map_reduce_kernel(
    x,
    factor,
    out,
    sample,
    kept,
    summed,
    kept_stride,
    summed_stride,
    EXPONENT: tl.constexpr,
    COEFFICIENT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [N, kept]: sums over the other index; each program takes a block of the kept one."""
    blocks = tl.cdiv(kept, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for first in range(0, summed, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (at < kept)[:, None] & (rows < summed)[None, :]
        offset = n * sample + at[:, None] * kept_stride + rows[None, :].to(tl.int64) * summed_stride
        value = _derivative(_load(x, offset, mask), EXPONENT, COEFFICIENT, ORDER)
        if HAS_FACTOR:
            value = value * _load(factor, offset, mask)
        total += tl.sum(tl.where(mask, value, 0.0), 1)
    tl.store(out + n * kept + at, total, mask=at < kept)


@triton.jit
def attention_map_adjoint_kernel(
    x,
    factor,
    spatial,
    channel,
    out,
    channels,
    positions,
    channel_stride,
    position_stride,
    EXPONENT: tl.constexpr,
    COEFFICIENT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SPATIAL: tl.constexpr,
    HAS_CHANNEL: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [N, C, positions], in the layout of x; each program takes a block of a sample."""
    elements = tl.cast(channels, tl.int64) * positions
    blocks = tl.cdiv(elements, BLOCK)
    n = tl.program_id(0) // blocks
    element = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # in memory order
    mask = element < elements
    c = element // channel_stride % channels
    position = element // position_stride % positions
    offset = n * elements + element
    value = _derivative(_load(x, offset, mask), EXPONENT, COEFFICIENT, ORDER)
    if HAS_FACTOR:
        value = value * _load(factor, offset, mask)
    grad = value * 0
    if HAS_SPATIAL:
        grad += _load(spatial, n * positions + position, mask)
    if HAS_CHANNEL:
        grad += _load(channel, n * channels + c, mask)
    tl.store(out + offset, (value * grad).to(out.dtype.element_ty), mask=mask)


def constants(p: float, order: int) -> dict[str, float]:
    """The compile-time constants of the order-th derivative of |x|^p."""
    return {"EXPONENT": p - order, "COEFFICIENT": math.prod(p - k for k in range(order)), "ORDER": order}


def _dense(x: Tensor, like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of channels and of positions: x is contiguous or channels-last."""
    C, positions = x.shape[1], x.shape[2] * x.shape[3]
    return (positions, 1) if x.is_contiguous() else (1, C)


def reduce(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    factor: Tensor | None,
    p: float,
    order: int,
    spatial: bool,
    channel: bool,
) -> None:
    x = _dense(x, x)
    factor = None if factor is None else _dense(factor, x)
    N, C, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    by_channel, by_position = _strides(x)
    sizes = ((positions, C, by_position, by_channel), (C, positions, by_channel, by_position))
    for out, wanted, (kept, summed, *strides) in zip(outputs, (spatial, channel), sizes, strict=True):
        if wanted:
            given = {"x": x, "factor": x if factor is None else factor, "out": out, "sample": C * positions}
            given |= {"kept": kept, "summed": summed, "kept_stride": strides[0], "summed_stride": strides[1]}
            given |= {"HAS_FACTOR": factor is not None, "BLOCK": BLOCK, "ROWS": ROWS, **constants(p, order)}
            run_programs(attention_map_reduce_kernel, N * triton.cdiv(kept, BLOCK), x.device, given)


def adjoint(
    out: Tensor,
    spatial: Tensor | None,
    channel: Tensor | None,
    x: Tensor,
    factor: Tensor | None,
    p: float,
    order: int,
) -> None:
    x = _dense(x, x)
    factor = None if factor is None else _dense(factor, x)
    spatial, channel = (None if t is None else t.contiguous() for t in (spatial, channel))
    N, C, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    absent = {"factor": factor, "spatial": spatial, "channel": channel}
    given = {"x": x, **{name: x if t is None else t for name, t in absent.items()}, "out": out}
    given |= {"channels": C, "positions": positions}
    given |= dict(zip(("channel_stride", "position_stride"), _strides(x), strict=True))
    given |= {f"HAS_{name.upper()}": t is not None for name, t in absent.items()}
    given |= {"BLOCK": BLOCK, **constants(p, order)}
    run_programs(attention_map_adjoint_kernel, N * triton.cdiv(C * positions, BLOCK), x.device, given)
