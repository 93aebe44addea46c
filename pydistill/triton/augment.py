"""The siamese augmentation in Triton: both forms (csrc/kernels/augment.h has their formulas).

Colours are affine in a pixel and its image's mean, so they commute with the index arithmetic and the resamplings: a
program takes a tile [PIXELS, CHANNELS] of one image, gathers it straight through at most four taps of the rotation with
four of the scaling each, and mixes the channels afterwards. The adjoint gathers too: for each of its pixels it visits
the results whose taps could reach it, so nothing is added atomically. What is in proportion to an image's mean is
summed before, by one program an image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

MOST = 256  # elements of a tile: two per thread, so that few registers are spilt


@triton.jit
def _between(low, value, high):  # a NaN comes out as low
    return tl.where(value > low, tl.where(value < high, value, high), low)


@triton.jit
def _whole(record, column, limit):
    return _between(-limit, tl.load(record + column), limit).to(tl.int32)


@triton.jit
def _finite(record, stride):
    return 0 * (tl.load(record + 10 * stride) + tl.load(record + 11 * stride) + tl.load(record + 12 * stride)) == 0


@triton.jit
def _rotation(record, turns, H, W, stride, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr):
    """From a result's place about the centre to the source's; and whether it is any."""
    # grid coordinates run from -1 to 1 between the centres of the outer pixels, or their outer edges
    across, down = W.to(COMPUTE), H.to(COMPUTE)
    if ALIGNED:
        across, down = across - 1, down - 1
    cosine, sine = tl.load(turns), tl.load(turns + 1)
    xy = tl.where(down > 0, -sine * across / tl.maximum(down, 1), 0.0)
    yx = tl.where(across > 0, sine * down / tl.maximum(across, 1), 0.0)
    return cosine, xy, yx, tl.load(record + 12 * stride) != 0


@triton.jit
def _tap(at, size, second):
    """Of the two sources of a place on an axis, the first or second: index and weight."""
    at = _between(-2, at, size.to(at.dtype))  # beyond, both sources are outside the image
    index = tl.floor(at)
    return index.to(tl.int32) + second, tl.where(second == 1, at - index, 1 - (at - index))


@triton.jit
def _source(record, stride, row, column, H, W, mirrored):
    """The image's pixel that a place shows after crop, cutout and flip; and whether there is any."""
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    column = tl.where(tl.load(record + 9 * stride) != 0, W - 1 - column, column)
    top, left = _whole(record, 5 * stride, 1e6), _whole(record, 6 * stride, 1e6)
    bottom, right = top + _whole(record, 7 * stride, 1e8), left + _whole(record, 8 * stride, 1e8)
    inside &= ~((row >= top) & (row < bottom) & (column >= left) & (column < right))
    row += _whole(record, 3 * stride, 1e6)
    column += _whole(record, 4 * stride, 1e6)
    inside &= (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return row, tl.where(mirrored, W - 1 - column, column), inside


@triton.jit
def _gathered(
    images, pixel, image_h, image_w, image_c, c, present, record, turns, stride, H, W, mirrored,
    ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """Of these pixels of the result, what they take from the image [PIXELS, CHANNELS], and with what weight in all."""
    centre_y, centre_x = (H - 1).to(COMPUTE) / 2, (W - 1).to(COMPUTE) / 2
    turned, xy, yx, rotates = _rotation(record, turns, H, W, stride, ALIGNED, COMPUTE)
    scale_x, scale_y = tl.load(record + 10 * stride).to(COMPUTE), tl.load(record + 11 * stride).to(COMPUTE)
    scales = (scale_x != 1) | (scale_y != 1)
    v, u = (pixel // W).to(COMPUTE) - centre_y, (pixel % W).to(COMPUTE) - centre_x
    own = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    weight = tl.zeros((PIXELS,), COMPUTE)
    # without an operation its first tap is the place itself, with weight one
    for turn in range(0, tl.where(rotates, 4, 1)):
        i, down = _tap(tl.where(rotates, yx * u + turned * v, v) + centre_y, H, turn // 2)
        j, across = _tap(tl.where(rotates, turned * u + xy * v, u) + centre_x, W, turn % 2)
        there = (i >= 0) & (i < H) & (j >= 0) & (j < W) & (pixel < H * W)
        part = down * across
        for step in range(0, tl.where(scales, 4, 1)):
            row, below = _tap(scale_y * (i.to(COMPUTE) - centre_y) + centre_y, H, step // 2)
            column, right = _tap(scale_x * (j.to(COMPUTE) - centre_x) + centre_x, W, step % 2)
            y, x, inside = _source(record, stride, row, column, H, W, mirrored)
            share = tl.where(inside & there, part * (below * right), 0.0)
            weight += share
            if LOADS:
                seen = (inside & there)[:, None] & present
                at = y.to(tl.int64)[:, None] * image_h + x.to(tl.int64)[:, None] * image_w + c * image_c
                value = tl.load(images + at, mask=seen, other=0).to(COMPUTE)
                own += tl.where(seen, share[:, None] * value, 0.0)
    return own, weight


@triton.jit(do_not_specialize=("C", "H", "W", "from_n", "from_c", "from_h", "from_w", "record_row", "record_column"))
def augment_means_kernel(
    images, record, turns,  # images, for the adjoint gradients of the results; [rows, 13]; [rows, 2]: cosine and sine
    constants,  # [rows]: what is added to each of a result's pixels, or of an image's
    N, C, H, W, from_n, from_c, from_h, from_w, record_row, record_column,
    BACKWARD: tl.constexpr, ALIGNED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if images.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    of_image = row if BACKWARD else row % N
    images += of_image * from_n
    record += row * record_row
    turns += row * 2
    c = tl.arange(0, CHANNELS).to(tl.int64)[None, :]
    contrast = tl.load(record + 2 * record_column).to(COMPUTE)
    total = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    for start in range(0, tl.where(contrast != 1, H * W, 0), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        inside = (pixel < H * W)[:, None] & (c < C)
        at = (pixel // W).to(tl.int64)[:, None] * from_h + (pixel % W).to(tl.int64)[:, None] * from_w + c * from_c
        value = tl.load(images + at, mask=inside, other=0).to(COMPUTE)
        if BACKWARD:
            _own, weight = _gathered(
                images, pixel, from_h, from_w, from_c, c, c < C, record, turns, record_column, H, W, row >= N,
                ALIGNED, COMPUTE, PIXELS, CHANNELS, False,
            )  # fmt: skip
            value *= weight[:, None]
        total += value
    mean = tl.sum(tl.sum(total, 1), 0) / (C.to(COMPUTE) * (H * W).to(COMPUTE))
    found = (1 - contrast) * mean
    tl.store(constants + row, tl.where(contrast == 1, 0.0, found + 0 * found))  # an infinite mean gives NaN


@triton.jit(do_not_specialize=("C", "H", "W", "from_n", "from_c", "from_h", "from_w", "record_row", "record_column"))
def augment_kernel(
    images, results, record, turns, constants,
    N, C, H, W, from_n, from_c, from_h, from_w, record_row, record_column,
    LINEAR: tl.constexpr, ALIGNED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if images.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(H * W, PIXELS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS).to(tl.int64)[None, :]
    record += row * record_row
    own, weight = _gathered(
        images + row % N * from_n, pixel, from_h, from_w, from_c, c, c < C, record, turns + row * 2, record_column,
        H, W, row >= N, ALIGNED, COMPUTE, PIXELS, CHANNELS, True,
    )  # fmt: skip
    brightness = tl.load(record).to(COMPUTE)
    saturation, contrast = tl.load(record + record_column).to(COMPUTE), tl.load(record + 2 * record_column).to(COMPUTE)
    added = tl.load(constants + row)
    if not LINEAR:
        added += brightness
    grey = tl.sum(own, 1) / C.to(COMPUTE)
    alike = tl.where(saturation != 1, contrast * (1 - saturation) * (grey + 0 * grey), 0.0)
    alike += tl.where(weight != 0, added * weight, 0.0)  # NaN only where the image is
    out = contrast * saturation * own + alike[:, None]
    out = tl.where(_finite(record, record_column), out, float("nan"))
    at = results + (row * C + c) * H * W + pixel[:, None]
    tl.store(at, out.to(results.dtype.element_ty), mask=(pixel < H * W)[:, None] & (c < C))


@triton.jit
def _first(at, reach, size):
    """The first of the places on an axis that are nearer to ``at`` than ``reach``."""
    return tl.floor(_between(-1, at - reach, (size - 1).to(at.dtype))).to(tl.int32) + 1


@triton.jit
def _count(reach, size):
    """How many there can be."""
    return _between(1, tl.ceil(2 * reach), size.to(reach.dtype)).to(tl.int32)


@triton.jit
def _inverse(scale, size):
    """Of a scale of zero, to which every place belongs, a reach as far as the image."""
    whole = tl.abs(scale) < 1e-6
    inverse = 1 / tl.where(whole, 1.0, scale)
    return tl.where(whole, 0.0, inverse), tl.where(whole, size.to(scale.dtype), tl.abs(inverse))


@triton.jit
def _tent(distance):
    weight = 1 - tl.abs(distance)
    return tl.where(weight > 0, weight, 0.0)


@triton.jit(do_not_specialize=("C", "H", "W", "from_n", "from_c", "from_h", "from_w", "record_row", "record_column"))
def augment_backward_kernel(
    grads, results, record, turns, constants,
    N, C, H, W, from_n, from_c, from_h, from_w, record_row, record_column,
    COPIES: tl.constexpr, ALIGNED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if grads.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(H * W, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS).to(tl.int64)[None, :]
    centre_y, centre_x = (H - 1).to(COMPUTE) / 2, (W - 1).to(COMPUTE) / 2
    out = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    finite = tl.full((), True, tl.int1)
    for copy in range(0, COPIES):
        result = n + copy * N
        row = record + result * record_row
        finite &= _finite(row, record_column)
        # to the place before scaling and rotation
        x = tl.where(copy == 1, W - 1 - pixel % W, pixel % W) - _whole(row, 4 * record_column, 1e6)
        y = pixel // W - _whole(row, 3 * record_column, 1e6)
        top, left = _whole(row, 5 * record_column, 1e6), _whole(row, 6 * record_column, 1e6)
        bottom, right = top + _whole(row, 7 * record_column, 1e8), left + _whole(row, 8 * record_column, 1e8)
        there = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (pixel < H * W)
        there &= ~((y >= top) & (y < bottom) & (x >= left) & (x < right))
        x = tl.where(tl.load(row + 9 * record_column) != 0, W - 1 - x, x)

        turned, xy, yx, rotates = _rotation(row, turns + result * 2, H, W, record_column, ALIGNED, COMPUTE)
        determinant = turned * turned - xy * yx
        regular = tl.abs(determinant) > 1e-3  # in an image of one row or column it can be any value up to 1
        by = tl.where(regular, 1 / tl.where(regular, determinant, 1.0), 0.0)
        back, back_xy, back_yx = turned * by, -xy * by, -yx * by
        reach_x = tl.where(regular, tl.abs(back) + tl.abs(back_xy), W.to(COMPUTE))
        reach_y = tl.where(regular, tl.abs(back) + tl.abs(back_yx), H.to(COMPUTE))
        scale_x = tl.load(row + 10 * record_column).to(COMPUTE)
        scale_y = tl.load(row + 11 * record_column).to(COMPUTE)
        scales = (scale_x != 1) | (scale_y != 1)
        inverse_x, near_x = _inverse(scale_x, W)
        inverse_y, near_y = _inverse(scale_y, H)
        first_r = _first(inverse_y * (y.to(COMPUTE) - centre_y) + centre_y, near_y, H)
        first_s = _first(inverse_x * (x.to(COMPUTE) - centre_x) + centre_x, near_x, W)
        first_r, first_s = tl.where(scales, first_r, y), tl.where(scales, first_s, x)

        own = tl.zeros((PIXELS, CHANNELS), COMPUTE)
        for a in range(0, tl.where(scales, _count(near_y, H), 1)):
            r = first_r + a
            down = _tent(scale_y * (r.to(COMPUTE) - centre_y) + centre_y - y.to(COMPUTE))
            down = tl.where(scales, down, 1.0)
            for b in range(0, tl.where(scales, _count(near_x, W), 1)):
                s = first_s + b
                across = _tent(scale_x * (s.to(COMPUTE) - centre_x) + centre_x - x.to(COMPUTE))
                part = down * tl.where(scales, across, 1.0)
                part = tl.where(there & (r < H) & (s < W), part, 0.0)
                v, u = r.to(COMPUTE) - centre_y, s.to(COMPUTE) - centre_x
                first_i = _first(back_yx * u + back * v + centre_y, reach_y, H)
                first_j = _first(back * u + back_xy * v + centre_x, reach_x, W)
                first_i, first_j = tl.where(rotates, first_i, r), tl.where(rotates, first_j, s)
                for k in range(0, tl.where(rotates, _count(reach_y, H), 1)):
                    i = first_i + k
                    i_v = i.to(COMPUTE) - centre_y
                    for l in range(0, tl.where(rotates, _count(reach_x, W), 1)):  # noqa: E741
                        j = first_j + l
                        j_u = j.to(COMPUTE) - centre_x
                        share = _tent(yx * j_u + turned * i_v - v) * _tent(turned * j_u + xy * i_v - u)
                        share = part * tl.where(rotates, share, 1.0)
                        seen = ((share > 0) & (i < H) & (j < W))[:, None] & (c < C)
                        at = grads + result * from_n + c * from_c
                        at += i.to(tl.int64)[:, None] * from_h + j.to(tl.int64)[:, None] * from_w
                        value = tl.load(at, mask=seen, other=0).to(COMPUTE)
                        own += tl.where(seen, share[:, None] * value, 0.0)
        saturation, contrast = tl.load(row + record_column).to(COMPUTE), tl.load(row + 2 * record_column).to(COMPUTE)
        grey = tl.sum(own, 1) / C.to(COMPUTE)
        alike = tl.where(saturation != 1, contrast * (1 - saturation) * (grey + 0 * grey), 0.0)
        out += contrast * saturation * own + (alike + tl.load(constants + result))[:, None]
    out = tl.where(finite, out, float("nan"))
    at = results + (n * C + c) * H * W + pixel[:, None]
    tl.store(at, out.to(results.dtype.element_ty), mask=(pixel < H * W)[:, None] & (c < C))


def arguments(
    x: Tensor, record: Tensor, turns: Tensor, constants: Tensor, images: int, align_corners: bool
) -> dict[str, Any]:
    """The arguments that the kernels share. x: the images, or the gradients of the results."""
    C, H, W = x.shape[1:]
    strides = dict(zip(("from_n", "from_c", "from_h", "from_w"), x.stride(), strict=True))
    strides |= {"record_row": record.stride(0), "record_column": record.stride(1)}
    channels = triton.next_power_of_2(C)
    tile = {"PIXELS": max(1, MOST // channels), "CHANNELS": channels}
    given = {"record": record, "turns": turns, "constants": constants, "N": images, "C": C, "H": H, "W": W}
    return {**given, **strides, **tile, "ALIGNED": align_corners}


COMPILER = {"num_warps": 4, "enable_fp_fusion": False}


def _prepared(x: Tensor, record: Tensor, images: int, align_corners: bool, backward: bool) -> dict[str, Any]:
    """The kernels' arguments, with the constants."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = record[:, 12].to(dtype)
    turns = torch.stack((angle.cos(), angle.sin()), 1)  # Triton's own are approximations
    given = arguments(x, record, turns, angle.new_empty(len(record)), images, align_corners)
    means = {**given, "images": x, "BACKWARD": backward}
    run_programs(augment_means_kernel, len(record) if x.numel() else 0, x.device, means, **COMPILER)
    return given


def forward(
    results: Tensor, images: Tensor, record: Tensor, flip_batch: bool, align_corners: bool, linear: bool
) -> None:
    """Fills ``results`` with what the operator of this name returns for the other arguments; so does the next."""
    given = _prepared(images, record, len(images), align_corners, False)
    given |= {"images": images, "results": results, "LINEAR": linear}
    programs = len(record) * triton.cdiv(images.shape[2] * images.shape[3], given["PIXELS"])
    run_programs(augment_kernel, programs, images.device, given, **COMPILER)


def backward(results: Tensor, grad: Tensor, record: Tensor, flip_batch: bool, align_corners: bool) -> None:
    copies = 2 if flip_batch else 1
    given = _prepared(grad, record, len(grad) // copies, align_corners, True)
    given |= {"grads": grad, "results": results, "COPIES": copies}
    programs = len(results) * triton.cdiv(grad.shape[2] * grad.shape[3], given["PIXELS"])
    run_programs(augment_backward_kernel, programs, grad.device, given, **COMPILER)
