"""The crops of a batch in Triton: both forms (csrc/kernels/multi_crop.h says what is computed).

A first kernel reads the record, and leaves a plan: what the others ask for of each part. A program takes a tile
[PIXELS, CHANNELS] of one result and gathers it straight from the images' pixels that its filters reach. The adjoint
gathers too: a program owns a tile of an image, visits the records' parts in order and the places whose filters reach
it, so nothing is added atomically. Filters are in integers, so that both directions agree on every weight to the last
bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

MOST, CHANNELS_AT_ONCE = 256, 16  # elements of a tile: two per thread, so that few registers are spilt
RECORDS = 128  # of a program that plans
_SOURCE, _TOP, _HEIGHT, _FLIP, _ROLL, _FIT, _TO_TOP, _TO_HEIGHT, _ALPHA = (
    tl.constexpr(column) for column in (0, 1, 3, 5, 6, 8, 9, 11, 13)
)  # as in multi_crop.h; what a part has for rows has its twin for columns next to it
COLUMNS = 17  # of a plan: the source, or -1 in an invalid record, flip, alpha, and seven for each axis
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _whole(part, column, stride, here):
    """And whether it is one."""
    value = tl.load(part + column * stride, mask=here, other=0)
    ordinary = tl.abs(value) < 1e9
    return tl.where(ordinary, value, -1.0).to(tl.int32), ordinary


@triton.jit
def _within(begin, length, size):  # differences, which do not overflow
    return (begin >= 0) & (begin <= size) & (length >= 0) & (length <= size - begin)


@triton.jit
def _plan_axis(part, to, stride, here, size, size_out, AXIS: tl.constexpr):
    """Writes where the box begins and how long it is; where the place begins and ends; the length of the resized crop,
    where in the result that begins, and by how much it is rolled. Returns whether box and place lie inside."""
    first, valid = _whole(part, _TOP + AXIS, stride, here)
    taken, taken_valid = _whole(part, _HEIGHT + AXIS, stride, here)
    begin, begin_valid = _whole(part, _TO_TOP + AXIS, stride, here)
    length, length_valid = _whole(part, _TO_HEIGHT + AXIS, stride, here)
    roll, roll_valid = _whole(part, _ROLL + AXIS, stride, here)
    fit = tl.load(part + _FIT * stride, mask=here, other=0) != 0
    resized = tl.maximum(tl.where(fit, length, size_out), 1)  # nothing is seen at a place without length
    roll %= resized
    tl.store(to, first, mask=here)
    tl.store(to + 1, taken, mask=here)
    tl.store(to + 2, begin, mask=here)
    tl.store(to + 3, begin + length, mask=here)
    tl.store(to + 4, resized, mask=here)
    tl.store(to + 5, tl.where(fit, begin, 0), mask=here)
    tl.store(to + 6, tl.where(roll < 0, roll + resized, roll), mask=here)
    valid &= taken_valid & begin_valid & length_valid & roll_valid
    return valid & (taken > 0) & _within(first, taken, size) & _within(begin, length, size_out)


@triton.jit(do_not_specialize=("B", "N", "H", "W", "height", "width", "record_row", "record_part", "record_column"))
def multi_crop_plan_kernel(
    record, plan,  # [B, PARTS, 14]; [B, PARTS, COLUMNS], whole numbers but for alpha
    B, N, H, W, height, width, record_row, record_part, record_column,
    PARTS: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    here = b < B
    record += b * record_row
    plan += b * PARTS * _COLUMNS
    valid = here
    for p in tl.static_range(PARTS):
        part, to = record + p * record_part, plan + p * _COLUMNS
        source, source_valid = _whole(part, _SOURCE, record_column, here)
        _flip, flip_valid = _whole(part, _FLIP, record_column, here)
        _fit, fit_valid = _whole(part, _FIT, record_column, here)
        valid &= source_valid & flip_valid & fit_valid & (source >= 0) & (source < N)
        tl.store(to + 1, tl.load(part + _FLIP * record_column, mask=here, other=0), mask=here)
        tl.store(to + 2, tl.load(part + _ALPHA * record_column, mask=here, other=0), mask=here)
        valid &= _plan_axis(part, to + 3, record_column, here, H, height, 0)
        valid &= _plan_axis(part, to + 10, record_column, here, W, width, 1)
    for p in tl.static_range(PARTS):
        source, _valid = _whole(record + p * record_part, _SOURCE, record_column, here)
        tl.store(plan + p * _COLUMNS, tl.where(valid, source, -1), mask=here)


@triton.jit
def _axis(part, AXIS: tl.constexpr):
    """What `_plan_axis` wrote."""
    part += 3 + 7 * AXIS
    first, taken = tl.load(part).to(tl.int32), tl.load(part + 1).to(tl.int32)
    begin, end = tl.load(part + 2).to(tl.int32), tl.load(part + 3).to(tl.int32)
    resized, origin, roll = tl.load(part + 4).to(tl.int32), tl.load(part + 5).to(tl.int32), tl.load(part + 6)
    return first, taken, begin, end, resized, origin, roll.to(tl.int32)


@triton.jit
def _near(centre, step, most, count):
    """Of the ``count`` pixels or places on an axis, ``step`` wide each, those within reach of ``centre``: two ends."""
    begin = tl.maximum(centre - 2 * most + step, 0) // (2 * step)
    return begin, tl.minimum((centre + 2 * most + step - 1) // (2 * step), count)


@triton.jit
def _filter(centre, taken, resized, most, COMPUTE: tl.constexpr):
    """Of a place with this centre, on an axis on which ``taken`` pixels become ``resized``: the pixels in reach; their
    weights' sum, and its inverse."""
    begin, end = _near(centre, resized, most, taken)
    half = tl.minimum(tl.maximum((centre + resized - 1) // (2 * resized), begin), end)  # from here on beyond it
    # the distances of pixels [a, b) from it have the sum (b * b - a * a) * resized - (b - a) * centre
    before, until, after = begin.to(tl.int64), half.to(tl.int64), end.to(tl.int64)
    distances = (after * after + before * before - 2 * until * until) * resized
    total = 2 * most * (after - before) - distances + (after + before - 2 * until) * centre
    return begin, end, total, 1 / total.to(COMPUTE)


@triton.jit
def _weight(off, most, total, inverse):
    """What a place takes of a pixel that is ``off`` from its centre."""
    q = tl.maximum(2 * most - tl.abs(off), 0)
    # a product with an inverse would not be exactly one where the whole weight is one pixel's
    return tl.where(q == total, 1.0, q.to(inverse.dtype) * inverse)


@triton.jit
def _seen(plan, p, i, j, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """How much of part p is seen at a place under the parts after it."""
    weight = tl.zeros(i.shape, COMPUTE) + tl.load(plan + p * _COLUMNS + 2).to(COMPUTE)
    for q in range(p + 1, PARTS):
        over = plan + q * _COLUMNS
        top, bottom = tl.load(over + 5).to(tl.int32), tl.load(over + 6).to(tl.int32)
        left, right = tl.load(over + 12).to(tl.int32), tl.load(over + 13).to(tl.int32)
        covered = (i >= top) & (i < bottom) & (j >= left) & (j < right)
        weight *= tl.where(covered, 1 - tl.load(over + 2).to(COMPUTE), 1.0)
    return weight


@triton.jit
def _shown(k, origin, roll, resized):
    """The place of the resized crop that place k of the result shows, before it is mirrored; and back."""
    r = k - origin - roll
    return tl.where(r < 0, r + resized, r)


@triton.jit
def _showing(r, origin, roll, resized):
    k = r + roll
    return tl.where(k >= resized, k - resized, k) + origin


@triton.jit
def _store(results, norm, out, n, c, pixel, C, pixels, LINEAR: tl.constexpr):
    present = c < C
    if norm is not None:
        if not LINEAR:
            out -= tl.load(norm + c, mask=present, other=0).to(out.dtype)
        out *= (1 / tl.load(norm + C + c, mask=present, other=1)).to(out.dtype)
    at = results + (n * C + c) * pixels + pixel[:, None]
    tl.store(at, out.to(results.dtype.element_ty), mask=(pixel < pixels)[:, None] & present)


@triton.jit(
    do_not_specialize=("C", "height", "width", "from_n", "from_c", "from_h", "from_w", "base_c", "base_h", "base_w")
)
def multi_crop_kernel(
    images, base, results, plan, norm,  # base and norm may be None
    C, height, width, from_n, from_c, from_h, from_w, base_c, base_h, base_w,
    LINEAR: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if images.dtype.element_ty == tl.float64 else tl.float32
    tiles, groups = tl.cdiv(height * width, PIXELS), tl.cdiv(C, CHANNELS)
    n = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    start = tl.program_id(0) // groups % tiles * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    c = (tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
    i, j = pixel // width, pixel % width
    plan += n * PARTS * _COLUMNS
    valid = tl.load(plan) >= 0
    out = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    for p in range(0, tl.where(valid, PARTS, 0)):
        part = plan + p * _COLUMNS
        top, rows_in, to_top, to_bottom, rows, origin_y, roll_y = _axis(part, 0)
        left, columns_in, to_left, to_right, columns, origin_x, roll_x = _axis(part, 1)
        most_y, most_x = tl.maximum(rows_in, rows), tl.maximum(columns_in, columns)
        seen = _seen(plan, p, i, j, COMPUTE, PARTS)
        sees = (i >= to_top) & (i < to_bottom) & (j >= to_left) & (j < to_right) & (pixel < height * width)
        sees &= seen != 0
        r, s = _shown(i, origin_y, roll_y, rows), _shown(j, origin_x, roll_x, columns)
        s = tl.where(tl.load(part + 1) != 0, columns - 1 - s, s)
        centre_y, centre_x = tl.where(sees, 2 * r + 1, 1) * rows_in, tl.where(sees, 2 * s + 1, 1) * columns_in
        y, y_end, total_y, inverse_y = _filter(centre_y, rows_in, rows, most_y, COMPUTE)
        x_begin, x_end, total_x, inverse_x = _filter(centre_x, columns_in, columns, most_x, COMPUTE)
        image = images + tl.load(part).to(tl.int64) * from_n + c * from_c
        own = tl.zeros((PIXELS, CHANNELS), COMPUTE)
        # no row of the tile may see the part
        passes = (start < to_bottom * width) & (start + PIXELS > to_top * width)
        for _a in range(0, tl.where(passes, tl.cdiv(2 * most_y, rows), 0)):
            weight_y = _weight((2 * y + 1) * rows - centre_y, most_y, total_y, inverse_y)
            sees_y = sees & (y < y_end)
            row = (top + y).to(tl.int64)[:, None]
            x = x_begin
            for _b in range(0, tl.cdiv(2 * most_x, columns)):
                weight = weight_y * _weight((2 * x + 1) * columns - centre_x, most_x, total_x, inverse_x)
                there = (sees_y & (x < x_end))[:, None] & (c < C)
                column = (left + x).to(tl.int64)[:, None]
                value = tl.load(image + row * from_h + column * from_w, mask=there, other=0).to(COMPUTE)
                if base is not None:
                    at = base + row * base_h + column * base_w + c * base_c
                    value += tl.load(at, mask=there, other=0).to(COMPUTE)
                own += tl.where(there, weight[:, None] * value, 0.0)
                x += 1
            y += 1
        out += tl.where(sees[:, None], seen[:, None] * own, 0.0)
    out = tl.where(valid, out, float("nan"))
    _store(results, norm, out, n, c, pixel, C, height * width, LINEAR)


@triton.jit(do_not_specialize=("B", "C", "H", "W", "from_n", "from_c", "from_h", "from_w"))
def multi_crop_backward_kernel(
    grads, results, plan, norm,
    B, C, H, W, from_n, from_c, from_h, from_w,
    SHARED: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if grads.dtype.element_ty == tl.float64 else tl.float32
    tiles, groups = tl.cdiv(H * W, PIXELS), tl.cdiv(C, CHANNELS)
    n = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    start = tl.program_id(0) // groups % tiles * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    c = (tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
    first_row, last_row = start // W, (start + PIXELS - 1) // W
    out = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    for k in range(0, B * PARTS):
        # most parts are of other images, or of rows that are not here: no more is read of them than that
        part = plan + (n * 0 + k) * _COLUMNS
        source, top = tl.load(part).to(tl.int32), tl.load(part + 3).to(tl.int32)
        wanted = (first_row < top + tl.load(part + 4).to(tl.int32)) & (last_row >= top)
        if wanted & ((source >= 0) if SHARED else (source == n)):
            top, rows_in, to_top, to_bottom, rows, origin_y, roll_y = _axis(part, 0)
            left, columns_in, to_left, to_right, columns, origin_x, roll_x = _axis(part, 1)
            most_y, most_x = tl.maximum(rows_in, rows), tl.maximum(columns_in, columns)
            mirrored = tl.load(part + 1) != 0
            p, result = k % PARTS, n * 0 + k // PARTS
            y, x = pixel // W - top, pixel % W - left
            inside = (y >= 0) & (y < rows_in) & (x >= 0) & (x < columns_in) & (pixel < H * W)
            y, x = tl.where(inside, 2 * y + 1, 1) * rows, tl.where(inside, 2 * x + 1, 1) * columns  # the pixel's centre
            r, r_end = _near(y, rows_in, most_y, rows)
            s_begin, s_end = _near(x, columns_in, most_x, columns)
            for _a in range(0, tl.cdiv(2 * most_y, rows_in)):
                to_y = _showing(r, origin_y, roll_y, rows)
                sees_y = inside & (r < r_end) & (to_y >= to_top) & (to_y < to_bottom)
                centre = tl.where(sees_y, 2 * r + 1, 1) * rows_in
                _begin, _end, total, inverse = _filter(centre, rows_in, rows, most_y, COMPUTE)
                weight_y = _weight(y - centre, most_y, total, inverse)
                row = grads + result * from_n + to_y.to(tl.int64)[:, None] * from_h + c * from_c
                s = s_begin
                for _b in range(0, tl.cdiv(2 * most_x, columns_in)):
                    to_x = _showing(tl.where(mirrored, columns - 1 - s, s), origin_x, roll_x, columns)
                    sees = sees_y & (s < s_end) & (to_x >= to_left) & (to_x < to_right)
                    centre = tl.where(sees, 2 * s + 1, 1) * columns_in
                    _begin, _end, total, inverse = _filter(centre, columns_in, columns, most_x, COMPUTE)
                    seen = _seen(part - p * _COLUMNS, p, to_y, to_x, COMPUTE, PARTS)
                    weight = seen * (weight_y * _weight(x - centre, most_x, total, inverse))
                    there = (sees & (seen != 0))[:, None] & (c < C)
                    value = tl.load(row + to_x.to(tl.int64)[:, None] * from_w, mask=there, other=0).to(COMPUTE)
                    out += tl.where(there, weight[:, None] * value, 0.0)
                    s += 1
                r += 1
    _store(results, norm, out, n, c, pixel, C, H * W, True)


def arguments(x: Tensor, plan: Tensor, norm: Tensor | None) -> dict[str, Any]:
    """The arguments that both kernels share. x: the images, or the gradients of the results."""
    strides = dict(zip(("from_n", "from_c", "from_h", "from_w"), x.stride(), strict=True))
    channels = min(triton.next_power_of_2(x.shape[1]), CHANNELS_AT_ONCE)
    tile = {"PARTS": plan.shape[1], "PIXELS": MOST // channels, "CHANNELS": channels}
    return {"plan": plan, "norm": norm, "C": x.shape[1], **strides, **tile}


def plan_arguments(record: Tensor) -> dict[str, Any]:
    given = dict(zip(("record_row", "record_part", "record_column"), record.stride(), strict=True))
    return given | {"record": record, "B": len(record), "PARTS": record.shape[1], "RECORDS": RECORDS}


COMPILER = {"num_warps": 4, "enable_fp_fusion": False}


def _planned(record: Tensor, N: int, H: int, W: int, height: int, width: int) -> Tensor:
    plan = record.new_empty(*record.shape[:2], COLUMNS)
    given = plan_arguments(record) | {"plan": plan, "N": N, "H": H, "W": W, "height": height, "width": width}
    run_programs(multi_crop_plan_kernel, triton.cdiv(len(record), RECORDS), record.device, given, **COMPILER)
    return plan


def _programs(results: Tensor, given: dict[str, Any]) -> int:
    rows, C, height, width = results.shape
    return rows * triton.cdiv(height * width, given["PIXELS"]) * triton.cdiv(C, given["CHANNELS"])


def forward(
    results: Tensor, images: Tensor, base: Tensor | None, record: Tensor, norm: Tensor | None,
    height: int, width: int, linear: bool,
) -> None:  # fmt: skip
    """Fills ``results`` with what the operator of this name returns for the other arguments; so does the next."""
    N, _, H, W = images.shape
    given = arguments(images, _planned(record, N, H, W, height, width), norm)
    base_strides = (0, 0, 0) if base is None else base.stride()[1:]
    given |= dict(zip(("base_c", "base_h", "base_w"), base_strides, strict=True))
    given |= {"images": images, "base": base, "results": results, "height": height, "width": width, "LINEAR": linear}
    run_programs(multi_crop_kernel, _programs(results, given), images.device, given, **COMPILER)


def backward(
    results: tuple[Tensor, Tensor], grad: Tensor, record: Tensor, norm: Tensor | None,
    images: int, height: int, width: int, with_images: bool, with_base: bool,
) -> None:  # fmt: skip
    plan = _planned(record, images, height, width, *grad.shape[2:])
    given = arguments(grad, plan, norm) | {"grads": grad, "B": len(record), "H": height, "W": width}
    for found, wanted, shared in zip(results, (with_images, with_base), (False, True), strict=True):
        if wanted:
            given |= {"results": found, "SHARED": shared}
            run_programs(multi_crop_backward_kernel, _programs(found, given), grad.device, given, **COMPILER)
