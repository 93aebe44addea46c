"""Definition of the crops of a batch: torch's own operators, one record after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = (
    *("source", "top", "left", "height", "width", "flip", "roll_y", "roll_x", "fit"),
    *("to_top", "to_left", "to_height", "to_width", "alpha"),
)


def multi_crop(
    images: Tensor,
    record: Tensor,
    out_size: tuple[int, int],
    base: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """``[B, C, *out_size]`` of ``[N, C, H, W]`` images; `pydistill.ops.multi_crop` says what a record holds.

    float32 arithmetic for bfloat16 and float16.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    if base is not None:
        x = x + base.to(dtype)
    out = [one(x, parts, out_size) for parts in record.double().tolist()]
    y = torch.stack(out) if out else x.new_zeros(0, x.shape[1], *out_size) + 0 * x.sum()
    if mean is not None:
        offset, scale = (torch.as_tensor(v, dtype=dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
        y = (y - offset) / scale
    return y.to(images.dtype)


def one(x: Tensor, parts: Sequence[Sequence[float]], out_size: tuple[int, int]) -> Tensor:
    """A record's parts, painted one over the other."""
    named = [dict(zip(COLUMNS, part, strict=True)) for part in parts]
    out = x.new_zeros(x.shape[1], *out_size)
    if not all(_is_valid(part, x.shape, out_size) for part in named):
        return out + float("nan")
    weights = torch.zeros(len(named), *out_size, dtype=x.dtype, device=x.device)
    for p, part in enumerate(named):
        rows, columns = _place(part)
        weights[:p, rows, columns] *= 1 - part["alpha"]
        weights[p, rows, columns] = part["alpha"]
    for part, weight in zip(named, weights, strict=True):
        rows, columns = _place(part)
        if weight[rows, columns].numel() == 0:
            continue
        whole = out_size if not part["fit"] else (rows.stop - rows.start, columns.stop - columns.start)
        resized = resized_crop(x, part, whole)
        if part["fit"]:
            resized = F.pad(resized, (columns.start, out_size[1] - columns.stop, rows.start, out_size[0] - rows.stop))
        out = out + torch.where(weight == 0, 0, weight * resized)  # unseen pixels do not count, NaN or not
    return out


def resized_crop(x: Tensor, part: dict[str, float], size: tuple[int, int]) -> Tensor:
    """``[C, *size]``: crop, antialiased bilinear resizing, flip, roll."""
    n, top, left, height, width, roll_y, roll_x = (
        int(part[name]) for name in ("source", "top", "left", "height", "width", "roll_y", "roll_x")
    )
    crop = x[n, :, top : top + height, left : left + width]
    y = _resized(crop.mT, (size[1], size[0])).mT if size[1] == 1 else _resized(crop, size)
    if part["flip"]:
        y = y.flip(-1)
    return y.roll((roll_y, roll_x), (-2, -1))


def _resized(crop: Tensor, size: tuple[int, int]) -> Tensor:
    """On a CPU torch's filter of rows is wrong if a result has one column and many rows: see the tests."""
    return F.interpolate(crop[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def _place(part: dict[str, float]) -> tuple[slice, slice]:
    top, left, height, width = (int(part[name]) for name in ("to_top", "to_left", "to_height", "to_width"))
    return slice(top, top + height), slice(left, left + width)


def _is_valid(part: dict[str, float], shape: Sequence[int], out_size: tuple[int, int]) -> bool:
    N, _, H, W = shape
    if not all(abs(value) < 1e9 for name, value in part.items() if name != "alpha"):
        return False
    top, left, height, width = (int(part[name]) for name in ("top", "left", "height", "width"))
    rows, columns = _place(part)
    box = 0 <= top < top + height <= H and 0 <= left < left + width <= W
    place = 0 <= rows.start <= rows.stop <= out_size[0] and 0 <= columns.start <= columns.stop <= out_size[1]
    return 0 <= int(part["source"]) < N and box and place
