"""Numbers in 8 bits, linear per group: the encoding of "logits8" and "features8".

A row is an offset and a step in float16 for each group of numbers, then the codes of all: offset + step * code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydistill._devices import to_device

__all__ = ["CLASSES", "pack", "unpack"]

CLASSES = 32  # per group in "logits8": 12 % more bytes than one group per row, and half its error
_LEVELS = 255


def pack(values: np.ndarray, group: int) -> np.ndarray:
    """Rows, uint8 ``[n, 4 * G + m]``, of float32 ``[n, m]`` in G groups of ``group`` numbers, the last with the rest.

    Every number is recovered to within half a step, which is a 255th of its group's range. The offset and step of
    groups that float16 cannot hold are infinite.
    """
    n, m = values.shape
    groups = -(-m // group)
    parts = np.pad(values, ((0, 0), (0, groups * group - m)), mode="edge").reshape(n, groups, group)
    lines = np.empty((n, groups, 2), np.float16)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        offset = _towards(parts.min(2), -np.inf)
        step = _towards((parts.max(2) - offset.astype(np.float32)) / _LEVELS, np.inf)
        codes = (parts - offset.astype(np.float32)[..., None]) / step.astype(np.float32)[..., None]
        codes = np.nan_to_num(codes).round().clip(0, _LEVELS).astype(np.uint8)  # zero for a step of zero
    lines[..., 0], lines[..., 1] = offset, step
    return np.concatenate([lines.reshape(n, -1).view(np.uint8), codes.reshape(n, -1)[:, :m]], 1)


def unpack(rows: Tensor, m: int, group: int, device: torch.device) -> Tensor:
    """The numbers, float32 ``[n, m]`` on ``device``, of rows on the CPU, which may be longer."""
    groups = -(-m // group)
    lines = to_device(rows[:, : 4 * groups].view(torch.float16), device).float().view(-1, groups, 1, 2)
    numbers = torch.empty(len(rows), groups * group, device=device, dtype=torch.float32)
    numbers[:, :m] = to_device(rows[:, 4 * groups : 4 * groups + m], device)
    numbers[:, m:] = 0
    parts = numbers.view(-1, groups, group)
    torch.addcmul(lines[..., 0], parts, lines[..., 1], out=parts)
    return numbers[:, :m]


def _towards(values: np.ndarray, end: float) -> np.ndarray:
    """Rounded to float16 in the direction of ``end``."""
    half = values.astype(np.float16)
    passed = half.astype(np.float32) > values if end < 0 else half.astype(np.float32) < values
    return np.where(passed, np.nextafter(half, np.float16(end)), half)
