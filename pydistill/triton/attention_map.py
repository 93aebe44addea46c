"""Triton kernels of `pydistill.ops.attention_map`: for NVIDIA and AMD GPUs, and for Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # positions, or channels, that a program takes at a time
ROWS = 16  # and how many rows of the other index it adds up in registers


@triton.jit
def _derivative(x, exponent, coefficient, ORDER: tl.constexpr, WHOLE: tl.constexpr):
    """The ORDER-th derivative of |x|^p, p - ORDER = exponent, which is WHOLE where that is 0 to 4."""
    magnitude = tl.abs(x)
    if WHOLE == 0:
        value = magnitude * 0 + 1
    elif WHOLE == 1:
        value = magnitude
    elif WHOLE == 2:
        value = magnitude * magnitude
    elif WHOLE == 3:
        value = magnitude * magnitude * magnitude
    elif WHOLE == 4:
        square = magnitude * magnitude
        value = square * square
    else:
        value = tl.where(magnitude == 0, 0.0, tl.exp(exponent * tl.log(magnitude)))
    if ORDER > 0:
        value = tl.where(magnitude == 0, 0.0, value * coefficient)
    if ORDER % 2 == 1:
        value = tl.where(x < 0, -value, value)
    return value


@triton.jit
def _load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)  # at once: bf16 is for storage


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
    exponent,
    coefficient,
    HAS_FACTOR: tl.constexpr,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [N, kept]: sums over the other index, a block of the kept one a program."""
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, summed, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (at < kept)[:, None] & (rows < summed)[None, :]
        offset = n * sample + at[:, None] * kept_stride + rows[None, :].to(tl.int64) * summed_stride
        value = _derivative(_load(x, offset, mask), exponent, coefficient, ORDER, WHOLE)
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
    exponent,
    coefficient,
    HAS_FACTOR: tl.constexpr,
    HAS_SPATIAL: tl.constexpr,
    HAS_CHANNEL: tl.constexpr,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [N, C, positions], in the layout of x, a block of a sample a program."""
    n = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # as they lie in memory
    mask = element < channels * positions
    c = element // channel_stride % channels
    position = element // position_stride % positions
    offset = n * channels * positions + element
    value = _derivative(_load(x, offset, mask), exponent, coefficient, ORDER, WHOLE)
    if HAS_FACTOR:
        value = value * _load(factor, offset, mask)
    grad = tl.zeros((BLOCK,), tl.float32)
    if HAS_SPATIAL:
        grad += _load(spatial, n * positions + position, mask)
    if HAS_CHANNEL:
        grad += _load(channel, n * channels + c, mask)
    tl.store(out + offset, (value * grad).to(out.dtype.element_ty), mask=mask)


def _constants(p: float, order: int) -> tuple[float, float, dict[str, int]]:
    coefficient = 1.0
    for k in range(order):
        coefficient *= p - k
    exponent = p - order
    whole = int(exponent) if exponent in (0, 1, 2, 3, 4) else -1
    return exponent, coefficient, {"ORDER": order, "WHOLE": whole}


def _dense(x: Tensor, like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int]:
    """From one channel to the next, and from one position to the next: x is contiguous or channels-last."""
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
    _refuse_double(x)
    x = _dense(x, x)
    factor = None if factor is None else _dense(factor, x)
    N, C, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    exponent, coefficient, constants = _constants(p, order)
    by_channel, by_position = _strides(x)
    sizes = ((positions, C, by_position, by_channel), (C, positions, by_channel, by_position))
    for out, wanted, (kept, summed, *strides) in zip(outputs, (spatial, channel), sizes, strict=True):
        if wanted and N and kept:
            attention_map_reduce_kernel[(N, triton.cdiv(kept, BLOCK))](
                *(x, x if factor is None else factor, out, C * positions, kept, summed, *strides),
                *(exponent, coefficient),
                HAS_FACTOR=factor is not None,
                BLOCK=BLOCK,
                ROWS=ROWS,
                **constants,
            )


def adjoint(
    out: Tensor,
    spatial: Tensor | None,
    channel: Tensor | None,
    x: Tensor,
    factor: Tensor | None,
    p: float,
    order: int,
) -> None:
    _refuse_double(x)
    x = _dense(x, x)
    factor = None if factor is None else _dense(factor, x)
    spatial, channel = (None if t is None else t.contiguous() for t in (spatial, channel))
    N, C, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    if not x.numel():
        return
    exponent, coefficient, constants = _constants(p, order)
    attention_map_adjoint_kernel[(N, triton.cdiv(C * positions, BLOCK))](
        *(x, *(x if t is None else t for t in (factor, spatial, channel)), out, C, positions, *_strides(x)),
        *(exponent, coefficient),
        HAS_FACTOR=factor is not None,
        HAS_SPATIAL=spatial is not None,
        HAS_CHANNEL=channel is not None,
        BLOCK=BLOCK,
        **constants,
    )


def _refuse_double(x: Tensor) -> None:
    if x.element_size() == 8:
        raise NotImplementedError("attention_map: backend='triton' has no float64 kernel; backend='reference' has")
