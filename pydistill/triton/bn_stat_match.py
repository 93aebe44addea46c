"""The BatchNorm statistics with the frozen BatchNorm in Triton (csrc/kernels/bn_stat_match.h has the formulas).

If positions are adjacent in memory, a program takes one channel of a tile of positions; if channels are, a block of
channels. Either way it is one tile [POSITIONS, CHANNELS], loaded once. The tiles' sums are merged in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

PLANES = ("x", "residual", "y", "grad_y", "grad_x", "grad_residual")
MERGED = 32  # tiles at a time


@triton.jit
def _load(planes, at, inside, COMPUTE: tl.constexpr):
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(planes + at, mask=inside, other=0).to(COMPUTE)


@triton.jit(do_not_specialize=("C", "P", "of_sample"))
def bn_stat_match_tiles_kernel(
    x, residual, y,  # [N, C, P]; None where absent
    scale, shift,  # [C]
    partial,  # [tiles, 3, C]
    x_n, x_c, x_p, residual_n, residual_c, residual_p, y_n, y_c, y_p,  # strides
    C, P, of_sample,  # tiles of a sample
    RELU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(C, CHANNELS)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    n, begin = tile // of_sample, tile % of_sample * POSITIONS
    p = begin + tl.arange(0, POSITIONS).to(tl.int64)[:, None]
    c = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    there = c < C
    inside = (p < P) & there[None, :]
    value = _load(x, n * x_n + c[None, :] * x_c + p * x_p, inside, COMPUTE)
    first = _load(x, n * x_n + c * x_c + begin * x_p, there, COMPUTE)
    apart = tl.where(inside, value - first[None, :], 0.0)
    out = partial + tile * 3 * C + c
    tl.store(out, first, mask=there)
    tl.store(out + C, tl.sum(apart, 0), mask=there)
    tl.store(out + 2 * C, tl.sum(apart * apart, 0), mask=there)
    if y is not None:
        result = value * tl.load(scale + c, mask=there)[None, :] + tl.load(shift + c, mask=there)[None, :]
        if residual is not None:
            result += _load(residual, n * residual_n + c[None, :] * residual_c + p * residual_p, inside, COMPUTE)
        if RELU:
            result = tl.where(result <= 0, 0.0, result)  # NaN stays, as in torch
        tl.store(y + n * y_n + c[None, :] * y_c + p * y_p, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("N", "C", "P", "of_sample", "tile"))
def bn_stat_match_merge_kernel(
    partial, statistics, kept_mean,  # [tiles, 3, C], [2, C], [C]
    N, C, P, of_sample, tile,
    TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    there = c < C
    count = tl.cast(N, tl.float64) * tl.cast(P, tl.float64)
    tiles = tl.cast(N, tl.int64) * of_sample
    total = tl.zeros((TILES, CHANNELS), tl.float64)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES).to(tl.int64)[:, None]
        inside = (t < tiles) & there[None, :]
        size = tl.minimum(P - t % of_sample * tile, tile).to(tl.float64)
        first = tl.load(partial + t * 3 * C + c[None, :], mask=inside, other=0).to(tl.float64)
        total += size * first + tl.load(partial + (t * 3 + 1) * C + c[None, :], mask=inside, other=0).to(tl.float64)
    mean = tl.sum(total, 0) / count
    squares = tl.zeros((TILES, CHANNELS), tl.float64)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES).to(tl.int64)[:, None]
        inside = (t < tiles) & there[None, :]
        size = tl.minimum(P - t % of_sample * tile, tile).to(tl.float64)
        first = tl.load(partial + t * 3 * C + c[None, :], mask=inside, other=0).to(tl.float64)
        sum_ = tl.load(partial + (t * 3 + 1) * C + c[None, :], mask=inside, other=0).to(tl.float64)
        square = tl.load(partial + (t * 3 + 2) * C + c[None, :], mask=inside, other=0).to(tl.float64)
        apart = first + sum_ / size - mean[None, :]
        squares += tl.where(inside, square - sum_ * sum_ / size + size * apart * apart, 0.0)
    var = tl.sum(squares, 0) / count
    var = tl.where(var < 0, 0.0, var)  # rounding may make that of a constant negative
    tl.store(statistics + c, mean.to(statistics.dtype.element_ty), mask=there)
    tl.store(kept_mean + c, mean.to(statistics.dtype.element_ty), mask=there)
    tl.store(statistics + C + c, var.to(statistics.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=("N", "C", "P", "of_sample"))
def bn_stat_match_backward_kernel(
    x, residual, grad_y, grad_x, grad_residual,  # [N, C, P]; None where absent
    scale, shift, mean, grad_statistics,  # [C], of the last [2, C]
    x_n, x_c, x_p, residual_n, residual_c, residual_p, grad_y_n, grad_y_c, grad_y_p,
    grad_x_n, grad_x_c, grad_x_p, grad_residual_n, grad_residual_c, grad_residual_p,
    N, C, P, of_sample,
    RELU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(C, CHANNELS)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    n = tile // of_sample
    p = tile % of_sample * POSITIONS + tl.arange(0, POSITIONS).to(tl.int64)[:, None]
    c = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    there = c < C
    inside = (p < P) & there[None, :]
    count = tl.cast(N, COMPUTE) * tl.cast(P, COMPUTE)
    level = tl.load(grad_statistics + c, mask=there) / count
    slope = 2 * tl.load(grad_statistics + C + c, mask=there) / count
    value = _load(x, n * x_n + c[None, :] * x_c + p * x_p, inside, COMPUTE)
    grad = level[None, :] + slope[None, :] * (value - tl.load(mean + c, mask=there)[None, :])
    if grad_y is not None:
        factor = tl.load(scale + c, mask=there)[None, :]
        g = _load(grad_y, n * grad_y_n + c[None, :] * grad_y_c + p * grad_y_p, inside, COMPUTE)
        if RELU:
            before = value * factor + tl.load(shift + c, mask=there)[None, :]
            if residual is not None:
                before += _load(residual, n * residual_n + c[None, :] * residual_c + p * residual_p, inside, COMPUTE)
            g = tl.where(before <= 0, 0.0, g)
        if residual is not None:
            at = grad_residual + n * grad_residual_n + c[None, :] * grad_residual_c + p * grad_residual_p
            tl.store(at, g.to(grad_x.dtype.element_ty), mask=inside)
        grad += factor * g
    at = grad_x + n * grad_x_n + c[None, :] * grad_x_c + p * grad_x_p
    tl.store(at, grad.to(grad_x.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    positions: int
    channels: int
    num_warps: int = 4


def configure(x: Tensor) -> Config:
    """Elements adjacent in memory go to adjacent threads: eight elements per thread."""
    C, P = x.shape[1:]
    if x.stride(1) == 1 and C > 1:
        channels = min(32, triton.next_power_of_2(C))
        return Config(max(1, min(1024 // channels, triton.next_power_of_2(P))), channels)
    return Config(min(1024, triton.next_power_of_2(P)), 1)


def arguments(kernel: Any, tensors: dict[str, Tensor | None], config: Config, relu: bool) -> dict[str, Any]:
    """A kernel's arguments, from tensors named like them."""
    N, C, P = tensors["x"].shape
    strides = {
        f"{name}_{letter}": 0 if tensors.get(name) is None else tensors[name].stride(i)
        for name in PLANES
        for i, letter in enumerate("ncp")
    }
    given = {**strides, **tensors, "N": N, "C": C, "P": P, "tile": config.positions, "TILES": MERGED}
    given |= {"of_sample": triton.cdiv(P, config.positions), "RELU": relu, "POSITIONS": config.positions}
    given["CHANNELS"] = 4 if kernel is bn_stat_match_merge_kernel else config.channels
    return {name: given.get(name) for name in kernel.arg_names}


def _launch(kernel: Any, programs: int, given: dict[str, Any], config: Config, device: torch.device) -> None:
    run_programs(kernel, programs, device, given, num_warps=config.num_warps, enable_fp_fusion=False)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> None:
    """Fills ``outputs`` with what the operator of this name returns for the other arguments; so does the next."""
    y, statistics, kept_mean = outputs
    N, C, P = x.shape
    config = configure(x)
    tiles = N * triton.cdiv(P, config.positions)
    partial = statistics.new_empty((tiles, 3, C))
    tensors = {"x": x, "residual": residual, "y": None if scale is None else y, "scale": scale, "shift": shift}
    tensors |= {"partial": partial, "statistics": statistics, "kept_mean": kept_mean}
    kernel = bn_stat_match_tiles_kernel
    _launch(kernel, tiles * triton.cdiv(C, config.channels), arguments(kernel, tensors, config, relu), config, x.device)
    kernel = bn_stat_match_merge_kernel
    given = arguments(kernel, tensors, config, relu)
    _launch(kernel, triton.cdiv(C, given["CHANNELS"]), given, config, x.device)


def backward(
    outputs: tuple[Tensor, Tensor],
    grad_y: Tensor | None,
    grad_statistics: Tensor,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    relu: bool,
) -> None:
    grad_x, grad_residual = outputs
    N, C, P = x.shape
    config = configure(x)
    if grad_y is None:
        residual = None
    tensors = {"x": x, "residual": residual, "grad_y": grad_y, "grad_x": grad_x, "scale": scale, "shift": shift}
    tensors |= {"grad_residual": None if residual is None else grad_residual}
    tensors |= {"mean": mean, "grad_statistics": grad_statistics}
    kernel = bn_stat_match_backward_kernel
    programs = N * triton.cdiv(P, config.positions) * triton.cdiv(C, config.channels)
    _launch(kernel, programs, arguments(kernel, tensors, config, relu), config, x.device)
