"""The ConvNet block after its convolution, in Triton: all four forms, from one kernel.

Per plane (n, c):  m = mean x,  r = 1/sqrt(var x + eps),  h = (x - m) r,  a = h weight + bias,
                   y = pool(relu(a)),  pool = 2x2 average, odd rows and columns dropped.

A program owns a panel: one sample, ``lanes`` adjacent channels, all H * W positions. A panel that fits in registers is
read once; a larger one is streamed, tile by tile, once for each pass over it:
    1. sum x [and x_t]
    2. sum the squared deviations of x [and their products with those of x_t]
    3. backward: sum the shares of grad_weight and grad_bias, from which the means in grad_x follow as well
    4. write y and grad_x
The means are subtracted before anything is squared, so planes far from zero keep their digits.

Derivation. With a_bar = [a > 0] grad_y spread over its window:
    grad_weight = sum a_bar h        grad_bias = sum a_bar
    grad_x      = r (weight a_bar - mean(weight a_bar) - h mean(weight a_bar h))
Along a direction, with s = mean(h x_t):
    h_t = r (x_t - mean(x_t) - h s)     a_t = h_t weight + h weight_t + bias_t     y_t = pool([a > 0] a_t)
and the product rule on the three lines of the backward, with r_t = -r^2 s, gives what the last pass writes.

The ReLU must open at the same positions in every form, and a student must get the same bits alone as beside others.
Both depend on the order in which a plane is summed, and that on how the compiler distributes a tile over threads. So
the tile, its warps and its lanes depend on x alone, strides and pointers are not specialised (their divisibility would
widen loads and so change the layout), and multiplications are fused with additions only where `fma` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

FORMS = ("forward", "backward", "jvp", "backward_jvp")
IMAGES = ("x", "x_t", "grad_y", "grad_y_t", "y", "grad_x")
CHANNELS = ("weight", "bias", "weight_t", "bias_t", "grad_weight", "grad_bias")
STRIDES = tuple(f"{image}_{axis}" for image in IMAGES for axis in "nchw")


@triton.jit
def _offsets(start, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """start, start + 1, ... along an axis of the tile [TILE_H, TILE_W, LANES]."""
    run = start + tl.arange(0, SIZE).to(tl.int64)
    if AXIS == 0:
        return run[:, None, None]
    elif AXIS == 1:
        return run[None, :, None]
    else:
        return run[None, None, :]


@triton.jit
def _load(plane, h, w, stride_h, stride_w, inside, COMPUTE: tl.constexpr):
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(plane + h * stride_h + w * stride_w, mask=inside, other=0).to(COMPUTE)


@triton.jit
def _sum(tile, TILE_H: tl.constexpr, TILE_W: tl.constexpr, LANES: tl.constexpr):
    """[TILE_H, TILE_W, LANES] -> [1, 1, LANES]"""
    return tl.sum(tl.reshape(tile, (TILE_H * TILE_W, LANES)), 0)[None, None, :]


@triton.jit
def _pooled(tile, POOL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, LANES: tl.constexpr):
    if POOL:
        windows = tl.reshape(tile, (TILE_H // 2, 2, TILE_W // 2, 2, LANES))
        return tl.sum(tl.sum(windows, 3), 1) * 0.25
    else:
        return tile


@triton.jit
def _spread(grad, POOL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, LANES: tl.constexpr):
    """The pool's transpose: each output's gradient spread over its window."""
    if POOL:
        windows = tl.reshape(grad, (TILE_H // 2, 1, TILE_W // 2, 1, LANES))
        windows = tl.broadcast_to(windows, (TILE_H // 2, 2, TILE_W // 2, 2, LANES))
        return tl.reshape(windows, (TILE_H, TILE_W, LANES)) * 0.25
    else:
        return grad


@triton.jit
def _gated(values, normalized, weight, bias, RELU: tl.constexpr):
    """values where the ReLU is open, else 0. As in torch, NaN counts as open: it shows, and its gradient passes."""
    if RELU:
        return tl.where(tl.fma(normalized, weight, bias) <= 0, 0.0, values)
    else:
        return values


@triton.jit
def _divide(a, b):
    # Triton's own division of float32 is an approximation
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _reciprocal_sqrt(a):
    if a.dtype == tl.float64:
        return 1.0 / tl.sqrt(a)
    else:
        return tl.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.sqrt_rn(a))


@triton.jit(do_not_specialize=("C", "H", "W", *STRIDES), do_not_specialize_on_alignment=(*IMAGES, *CHANNELS))
def instance_norm_relu_avg_pool_kernel(
    x, x_t, grad_y, grad_y_t, y, grad_x,  # [N, C, H, W] or pooled; None if the form does not use it
    weight, bias, weight_t, bias_t,  # [C]
    grad_weight, grad_bias,  # [N, C]: one sample's share
    C, H, W,
    x_n, x_c, x_h, x_w,
    x_t_n, x_t_c, x_t_h, x_t_w,
    grad_y_n, grad_y_c, grad_y_h, grad_y_w,
    grad_y_t_n, grad_y_t_c, grad_y_t_h, grad_y_t_w,
    y_n, y_c, y_h, y_w,
    grad_x_n, grad_x_c, grad_x_h, grad_x_w,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    TILE_H: tl.constexpr,  # a power of two, like the next two; covers the whole plane unless STREAMED
    TILE_W: tl.constexpr,
    LANES: tl.constexpr,
    STREAMED: tl.constexpr,
):  # fmt: skip
    TANGENTS: tl.constexpr = x_t is not None
    BACKWARD: tl.constexpr = grad_y is not None
    HAS_GRAD_Y_T: tl.constexpr = grad_y_t is not None
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    HALVED: tl.constexpr = 2 if POOL else 1
    TILE_H_Y: tl.constexpr = TILE_H // HALVED
    TILE_W_Y: tl.constexpr = TILE_W // HALVED
    H_y, W_y = H // HALVED, W // HALVED

    panels = tl.cdiv(C, LANES)  # of one sample
    n = (tl.program_id(0) // panels).to(tl.int64)
    c = _offsets(tl.program_id(0) % panels * LANES, LANES, 2)
    present = c < C
    size = (H.to(tl.int64) * W).to(COMPUTE) + tl.zeros((1, 1, LANES), COMPUTE)

    if STREAMED:
        tiles_w = tl.cdiv(W, TILE_W)
        tiles = tl.cdiv(H, TILE_H) * tiles_w
    else:
        tiles_w = 1
        tiles = 1

    x_plane = x + n * x_n + c * x_c
    if TANGENTS:
        x_t_plane = x_t + n * x_t_n + c * x_t_c
    if BACKWARD:
        grad_y_plane = grad_y + n * grad_y_n + c * grad_y_c
    if HAS_GRAD_Y_T:
        grad_y_t_plane = grad_y_t + n * grad_y_t_n + c * grad_y_t_c
    if not STREAMED:
        h, w = _offsets(0, TILE_H, 0), _offsets(0, TILE_W, 1)
        inside = (h < H) & (w < W) & present
        x_tile = _load(x_plane, h, w, x_h, x_w, inside, COMPUTE)
        if TANGENTS:
            x_t_tile = _load(x_t_plane, h, w, x_t_h, x_t_w, inside, COMPUTE)
        h_y, w_y = _offsets(0, TILE_H_Y, 0), _offsets(0, TILE_W_Y, 1)
        inside_y = (h_y < H_y) & (w_y < W_y) & present
        if BACKWARD:
            grad_y_tile = _load(grad_y_plane, h_y, w_y, grad_y_h, grad_y_w, inside_y, COMPUTE)
        if HAS_GRAD_Y_T:
            grad_y_t_tile = _load(grad_y_t_plane, h_y, w_y, grad_y_t_h, grad_y_t_w, inside_y, COMPUTE)

    # Pass 1: the means
    sum_x = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
    sum_x_t = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
    for tile in range(tiles):
        if STREAMED:
            h, w = _offsets(tile // tiles_w * TILE_H, TILE_H, 0), _offsets(tile % tiles_w * TILE_W, TILE_W, 1)
            inside = (h < H) & (w < W) & present
            x_tile = _load(x_plane, h, w, x_h, x_w, inside, COMPUTE)
            if TANGENTS:
                x_t_tile = _load(x_t_plane, h, w, x_t_h, x_t_w, inside, COMPUTE)
        sum_x += x_tile
        if TANGENTS:
            sum_x_t += x_t_tile
    mean = _divide(_sum(sum_x, TILE_H, TILE_W, LANES), size)
    if TANGENTS:
        mean_t = _divide(_sum(sum_x_t, TILE_H, TILE_W, LANES), size)

    # Pass 2: the variance, and its tangent
    sum_xx = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
    sum_xx_t = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
    for tile in range(tiles):
        if STREAMED:
            h, w = _offsets(tile // tiles_w * TILE_H, TILE_H, 0), _offsets(tile % tiles_w * TILE_W, TILE_W, 1)
            inside = (h < H) & (w < W) & present
            x_tile = _load(x_plane, h, w, x_h, x_w, inside, COMPUTE)
            if TANGENTS:
                x_t_tile = _load(x_t_plane, h, w, x_t_h, x_t_w, inside, COMPUTE)
        deviation = tl.where(inside, x_tile - mean, 0.0)
        sum_xx = tl.fma(deviation, deviation, sum_xx)
        if TANGENTS:
            sum_xx_t = tl.fma(deviation, x_t_tile - mean_t, sum_xx_t)
    r = _reciprocal_sqrt(_divide(_sum(sum_xx, TILE_H, TILE_W, LANES), size) + EPS)
    if TANGENTS:
        s = r * _divide(_sum(sum_xx_t, TILE_H, TILE_W, LANES), size)

    gain = tl.load(weight + c, mask=present, other=0)
    shift = tl.load(bias + c, mask=present, other=0)
    if TANGENTS:
        gain_t = tl.load(weight_t + c, mask=present, other=0)
        shift_t = tl.load(bias_t + c, mask=present, other=0)

    # Pass 3: sums of a_bar and a_bar h, and their tangents
    if BACKWARD:
        sum_a = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
        sum_ah = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
        sum_a_t = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
        sum_ah_t = tl.zeros((TILE_H, TILE_W, LANES), COMPUTE)
        # Pass 4 has its means from this loop, though they are equal: Triton 3.6 changes their layout within the loop,
        # takes the changed ones outside of it, too, and refuses its own work.
        mean_4 = tl.zeros((1, 1, LANES), COMPUTE)
        mean_t_4 = tl.zeros((1, 1, LANES), COMPUTE)
        for tile in range(tiles):
            mean_4 = mean
            if TANGENTS:
                mean_t_4 = mean_t
            if STREAMED:
                h, w = _offsets(tile // tiles_w * TILE_H, TILE_H, 0), _offsets(tile % tiles_w * TILE_W, TILE_W, 1)
                inside = (h < H) & (w < W) & present
                x_tile = _load(x_plane, h, w, x_h, x_w, inside, COMPUTE)
                if TANGENTS:
                    x_t_tile = _load(x_t_plane, h, w, x_t_h, x_t_w, inside, COMPUTE)
                h_y = _offsets(tile // tiles_w * TILE_H_Y, TILE_H_Y, 0)
                w_y = _offsets(tile % tiles_w * TILE_W_Y, TILE_W_Y, 1)
                inside_y = (h_y < H_y) & (w_y < W_y) & present
                grad_y_tile = _load(grad_y_plane, h_y, w_y, grad_y_h, grad_y_w, inside_y, COMPUTE)
                if HAS_GRAD_Y_T:
                    grad_y_t_tile = _load(grad_y_t_plane, h_y, w_y, grad_y_t_h, grad_y_t_w, inside_y, COMPUTE)
            normalized = (x_tile - mean) * r
            a_bar = _gated(_spread(grad_y_tile, POOL, TILE_H, TILE_W, LANES), normalized, gain, shift, RELU)
            sum_a += a_bar
            sum_ah = tl.fma(a_bar, normalized, sum_ah)
            if TANGENTS:
                normalized_t = r * (x_t_tile - mean_t - normalized * s)
                sum_ah_t = tl.fma(a_bar, normalized_t, sum_ah_t)
            if HAS_GRAD_Y_T:
                a_bar_t = _gated(_spread(grad_y_t_tile, POOL, TILE_H, TILE_W, LANES), normalized, gain, shift, RELU)
                sum_a_t += a_bar_t
                sum_ah_t = tl.fma(a_bar_t, normalized, sum_ah_t)
        total_a, total_ah = _sum(sum_a, TILE_H, TILE_W, LANES), _sum(sum_ah, TILE_H, TILE_W, LANES)
        # the means of weight a_bar and weight a_bar h are those sums, and so are their tangents
        m1, m2 = _divide(gain * total_a, size), _divide(gain * total_ah, size)
        share = n * C + c
        if TANGENTS:
            total_a_t, total_ah_t = _sum(sum_a_t, TILE_H, TILE_W, LANES), _sum(sum_ah_t, TILE_H, TILE_W, LANES)
            m1_t = _divide(gain_t * total_a + gain * total_a_t, size)
            m2_t = _divide(gain_t * total_ah + gain * total_ah_t, size)
            tl.store(grad_weight + share, total_ah_t, mask=present)
            tl.store(grad_bias + share, total_a_t, mask=present)
        else:
            tl.store(grad_weight + share, total_ah, mask=present)
            tl.store(grad_bias + share, total_a, mask=present)
        mean, mean_t = mean_4, mean_t_4

    # Pass 4: the images
    for tile in range(tiles):
        if STREAMED:
            h, w = _offsets(tile // tiles_w * TILE_H, TILE_H, 0), _offsets(tile % tiles_w * TILE_W, TILE_W, 1)
            inside = (h < H) & (w < W) & present
            x_tile = _load(x_plane, h, w, x_h, x_w, inside, COMPUTE)
            if TANGENTS:
                x_t_tile = _load(x_t_plane, h, w, x_t_h, x_t_w, inside, COMPUTE)
            h_y = _offsets(tile // tiles_w * TILE_H_Y, TILE_H_Y, 0)
            w_y = _offsets(tile % tiles_w * TILE_W_Y, TILE_W_Y, 1)
            inside_y = (h_y < H_y) & (w_y < W_y) & present
            if BACKWARD:
                grad_y_tile = _load(grad_y_plane, h_y, w_y, grad_y_h, grad_y_w, inside_y, COMPUTE)
            if HAS_GRAD_Y_T:
                grad_y_t_tile = _load(grad_y_t_plane, h_y, w_y, grad_y_t_h, grad_y_t_w, inside_y, COMPUTE)
        normalized = (x_tile - mean) * r
        if TANGENTS:
            normalized_t = r * (x_t_tile - mean_t - normalized * s)
        if TANGENTS or not BACKWARD:
            a = normalized_t * gain + normalized * gain_t + shift_t if TANGENTS else tl.fma(normalized, gain, shift)
            y_tile = _pooled(_gated(a, normalized, gain, shift, RELU), POOL, TILE_H, TILE_W, LANES)
            y_at = y + n * y_n + c * y_c + h_y * y_h + w_y * y_w
            tl.store(y_at, y_tile.to(y.dtype.element_ty), mask=inside_y)
        if BACKWARD:
            a_bar = _gated(_spread(grad_y_tile, POOL, TILE_H, TILE_W, LANES), normalized, gain, shift, RELU)
            grad = r * (gain * a_bar - m1 - normalized * m2)
            if TANGENTS:
                e_t = gain_t * a_bar
                if HAS_GRAD_Y_T:
                    spread_t = _spread(grad_y_t_tile, POOL, TILE_H, TILE_W, LANES)
                    e_t += gain * _gated(spread_t, normalized, gain, shift, RELU)
                grad = r * (e_t - m1_t - normalized_t * m2 - normalized * m2_t - s * grad)
            grad_x_at = grad_x + n * grad_x_n + c * grad_x_c + h * grad_x_h + w * grad_x_w
            tl.store(grad_x_at, grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("N", "C"), do_not_specialize_on_alignment=("shares", "total"))
def sum_over_batch_kernel(shares, total, N, C, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """total[c] = sum of shares[n, c] over n, one after another, so that the order does not depend on C."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sum_ = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, UNROLL):
        for i in tl.static_range(UNROLL):  # loads in flight
            n = tl.zeros((BLOCK,), tl.int64) + start + i
            sum_ += tl.load(shares + n * C + c, mask=(n < N) & (c < C), other=0).to(tl.float64)
    tl.store(total + c, sum_.to(total.dtype.element_ty), mask=c < C)


@dataclass(frozen=True)
class Config:
    """How a launch divides its work; every field but ``num_warps`` is the kernel's argument of that name."""

    tile_h: int
    tile_w: int
    lanes: int
    streamed: bool
    num_warps: int


def configure(x: Tensor, warp_size: int = 32) -> Config:
    """The launch for one x, in every form: all must sum a plane in the same order.

    With channels-last, ``lanes`` channels fill one 32-byte sector, the least that global memory moves; if that many
    planes are too much for the registers, down to a quarter of one.
    """
    H, W = x.shape[2:]
    most = 2048 if x.dtype == torch.float64 else 4096  # elements of a tile: more would spill registers
    tile_h, tile_w = (max(2, triton.next_power_of_2(size)) for size in (H, W))
    lanes = 1
    if x.stride(1) == 1 and x.stride(3) != 1:
        lanes = sector = 32 // x.element_size()
        while lanes > sector // 4 and tile_h * tile_w * lanes > most:
            lanes //= 2
    streamed = tile_h * tile_w * lanes > most
    if streamed:  # short and wide, to follow rows; the passes' running sums need registers too
        most //= 2
        tile_w = min(tile_w, 128)
        tile_h = max(2, min(tile_h, most // (tile_w * lanes)))
    # about eight elements per thread: enough work to amortise block-wide sums, and loads to hide latency
    threads = min(max(tile_h * tile_w * lanes // 8, warp_size), 512)
    return Config(tile_h, tile_w, lanes, streamed, threads // warp_size)


def arguments(tensors: dict[str, Tensor | None], config: Config, eps: float, relu: bool, pool: bool) -> dict[str, Any]:
    """The kernel's arguments, from tensors named like them."""
    x = tensors["x"]
    assert x is not None
    strides: dict[str, Any] = dict.fromkeys(STRIDES, 0)
    for image in IMAGES:
        if (tensor := tensors.get(image)) is not None:
            strides |= {f"{image}_{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}
    tile = {"TILE_H": config.tile_h, "TILE_W": config.tile_w, "LANES": config.lanes, "STREAMED": config.streamed}
    return {
        **{name: tensors.get(name) for name in (*IMAGES, *CHANNELS)},
        **dict(zip("CHW", x.shape[1:], strict=True)),
        **strides,
        **{"EPS": eps, "RELU": relu, "POOL": pool},
        **tile,
    }


def _check(tensors: dict[str, Tensor | None], pool: bool) -> None:
    """The kernel does not check its arguments, so everything must fit x here."""
    x = tensors["x"]
    assert x is not None
    N, C, H, W = x.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = (N, C, H // 2, W // 2) if pool else (N, C, H, W)
    shapes = {"x": x.shape, "x_t": x.shape, "grad_x": x.shape, "grad_weight": (N, C), "grad_bias": (N, C)}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        image = name in IMAGES
        shape, dtype = shapes.get(name, pooled if image else (C,)), x.dtype if image else compute
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {list(shape)} of {dtype} on {x.device}, "
                f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
        if not image and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def launch(tensors: dict[str, Tensor | None], eps: float, relu: bool, pool: bool) -> None:
    """Fill those of y, grad_x and the shares [N, C] of grad_weight and grad_bias that are among ``tensors``.

    The form follows from what is given: tangents come with x_t, gradients with grad_y.
    """
    _check(tensors, pool)
    x = tensors["x"]
    assert x is not None
    config = configure(x, _warp_size())
    N, C = x.shape[:2]
    programs = N * triton.cdiv(C, config.lanes)
    given = arguments(tensors, config, eps, relu, pool)
    compiler = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    run_programs(instance_norm_relu_avg_pool_kernel, programs, x.device, given, **compiler)


SUM_BLOCK, SUM_UNROLL = 32, 16


def sum_over_batch(shares: Tensor, total: Tensor) -> None:
    """``total[c] = sum of shares[n, c]`` over n: [N, C] -> [C]."""
    N, C = shares.shape
    given = {"shares": shares, "total": total, "N": N, "C": C, "BLOCK": SUM_BLOCK, "UNROLL": SUM_UNROLL}
    run_programs(sum_over_batch_kernel, triton.cdiv(C, SUM_BLOCK), shares.device, given, num_warps=1)


def forward(outputs: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> None:
    """Fills ``outputs`` with what the operator of this name returns for the other arguments; so do the next three."""
    launch({"x": x, "weight": weight, "bias": bias, "y": outputs}, *options)


def backward(
    outputs: tuple[Tensor, ...], grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> None:
    _with_shares({"x": x, "weight": weight, "bias": bias, "grad_y": grad_y}, outputs, options)


def jvp(
    outputs: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor,
    *options: Any,
) -> None:
    tangents = {"x_t": x_t, "weight_t": weight_t, "bias_t": bias_t}
    launch({"x": x, "weight": weight, "bias": bias, **tangents, "y": outputs}, *options)


def backward_jvp(
    outputs: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_y_t: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor,
    *options: Any,
) -> None:
    tangents = {"x_t": x_t, "weight_t": weight_t, "bias_t": bias_t, "grad_y_t": grad_y_t, "y": outputs[0]}
    inputs = {"x": x, "weight": weight, "bias": bias, "grad_y": grad_y}
    _with_shares(inputs | tangents, outputs[1:], options)


def _with_shares(tensors: dict[str, Tensor | None], gradients: tuple[Tensor, ...], options: tuple) -> None:
    grad_x, grad_weight, grad_bias = gradients
    N, C = grad_x.shape[:2]
    weight_shares, bias_shares = (total.new_empty(N, C) for total in (grad_weight, grad_bias))
    launch({**tensors, "grad_x": grad_x, "grad_weight": weight_shares, "grad_bias": bias_shares}, *options)
    sum_over_batch(weight_shares, grad_weight)
    sum_over_batch(bias_shares, grad_bias)


def _warp_size() -> int:
    if not isinstance(instance_norm_relu_avg_pool_kernel, triton.JITFunction):  # the interpreter has no warps
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size
