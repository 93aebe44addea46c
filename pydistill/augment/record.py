"""Records of crops: the share of each source, to mix labels, and conversion to bytes."""

from __future__ import annotations

import struct
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from pydistill._renamed import renamed
from pydistill.ops.multi_crop import COLUMNS, MAX_PARTS

MAGIC = b"pdmcrop1"
HEADER = struct.Struct("<8sIB3x")  # magic, rows, parts
PACKED = np.dtype(
    [
        ("source", "<u4"),
        *((name, "<u2") for name in ("top", "left", "height", "width", "to_top", "to_left", "to_height", "to_width")),
        *((name, "<i2") for name in ("roll_y", "roll_x")),
        ("flags", "u1"),  # bit 0: flip, bit 1: fit
        ("alpha", "<f4"),
    ]
)


def record_to_bytes(record: Tensor) -> bytes:
    """A record as bytes: 16, plus 29 per part for each of its rows: 58 for mixup and cutmix.

    `record_from_bytes` recovers every bit, and so the same crops.

    Args:
        record: float32 ``[B, P, 14]``: see `pydistill.ops.multi_crop`. Flip and fit are kept as 0 or 1.

    Raises:
        TypeError, ValueError: it is not a record, or a number does not fit its field.
    """
    if not isinstance(record, Tensor) or record.dtype != torch.float32:
        raise TypeError(f"record: expected a float32 tensor, got {getattr(record, 'dtype', type(record).__name__)}")
    if record.dim() != 3 or not 1 <= record.shape[1] <= MAX_PARTS or record.shape[2] != len(COLUMNS):
        raise ValueError(
            f"record: expected shape [B, P, {len(COLUMNS)}] with P of 1 to {MAX_PARTS}, got {list(record.shape)}"
        )
    columns = dict(zip(COLUMNS, record.detach().cpu().unbind(2), strict=True))
    packed = np.zeros(record.shape[:2], PACKED)
    packed["flags"] = (columns.pop("flip") != 0).numpy() + 2 * (columns.pop("fit") != 0).numpy()
    packed["alpha"] = columns.pop("alpha").numpy()
    for name, values in columns.items():
        limits = np.iinfo(PACKED[name])
        fits = (values >= limits.min) & (values <= min(limits.max, 2**24)) & (values == values.floor())
        if not bool(fits.all()):
            raise ValueError(
                f"record: expected whole numbers of {limits.min} to {min(limits.max, 2**24)} as {name}, "
                f"got {values[~fits][0].item()}"
            )
        packed[name] = values.numpy()
    return HEADER.pack(MAGIC, len(record), record.shape[1]) + packed.tobytes()


def record_from_bytes(data: bytes | bytearray | memoryview) -> Tensor:
    """The record that `record_to_bytes` turned into these bytes, float32 ``[B, P, 14]`` on the CPU.

    Raises:
        ValueError: they are not a record, or not a complete one.
    """
    if len(data) < HEADER.size:
        raise ValueError(f"data: expected a record of at least {HEADER.size} bytes, got {len(data)}")
    magic, rows, parts = HEADER.unpack_from(data)
    if magic != MAGIC or not 1 <= parts <= MAX_PARTS:
        raise ValueError(f"data: expected a record that begins with {MAGIC!r}, got {bytes(data[:8])!r}, {parts} parts")
    expected = HEADER.size + rows * parts * PACKED.itemsize
    if len(data) != expected:
        raise ValueError(f"data: expected {expected} bytes for {rows} rows of {parts} parts, got {len(data)}")
    packed = np.frombuffer(data, PACKED, offset=HEADER.size).reshape(rows, parts)
    flags = {"flip": packed["flags"] & 1, "fit": packed["flags"] >> 1 & 1}
    columns = [(flags[name] if name in flags else packed[name]).astype(np.float32) for name in COLUMNS]
    return torch.from_numpy(np.stack(columns, 2))


def mix_weights(record: Tensor, out_size: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which images each result is made from, and the share of each.

    For mixup ``[lam, 1 - lam]``; for cutmix the box's share of the pixels after clipping; a quarter for each tile.

    Args:
        record: float32 ``[B, P, 14]``.
        out_size: as in `pydistill.ops.multi_crop`.

    Returns:
        sources, int64 ``[B, P]``, and weights, float32 ``[B, P]``.
    """
    H, W = (out_size, out_size) if isinstance(out_size, int) else out_size
    columns = dict(zip(COLUMNS, record.double().unbind(2), strict=True))
    alpha, top, left = columns["alpha"], columns["to_top"], columns["to_left"]
    bottom, right = top + columns["to_height"], left + columns["to_width"]

    def common(parts: list[int]) -> Tensor:  # [B]: area of the intersection of their places
        height = bottom[:, parts].amin(1) - top[:, parts].amax(1)
        width = right[:, parts].amin(1) - left[:, parts].amax(1)
        return height.clamp(min=0) * width.clamp(min=0)

    P = record.shape[1]
    weights = []
    for p in range(P):
        seen = torch.zeros_like(alpha[:, 0])
        for count in range(P - p):  # what later parts paint over, by inclusion and exclusion
            for over in combinations(range(p + 1, P), count):
                seen += (-1) ** count * alpha[:, list(over)].prod(1) * common([p, *over])
        weights.append(alpha[:, p] * seen / (H * W))
    return columns["source"].long(), torch.stack(weights, 1).float()


@renamed(classes="num_classes")
def mix_labels(
    labels: Tensor, record: Tensor, out_size: int | tuple[int, int], *, num_classes: int | None = None
) -> Tensor:
    """Labels of results, mixed like their pixels: ``sum_p weights[:, p] * labels[sources[:, p]]``.

    Args:
        labels: of the images: ``[N, K]`` probabilities, or int64 ``[N]`` classes.
        record: float32 ``[B, P, 14]`` on the device of labels.
        out_size: as in `pydistill.ops.multi_crop`.
        num_classes: K, where labels are class numbers.

    Returns:
        ``[B, K]``, in the dtype of the probabilities, float32 for classes.

    Raises:
        ValueError: labels have another shape, or ``num_classes`` is missing.
    """
    if labels.dim() == 1:
        if num_classes is None:
            raise ValueError("num_classes: expected how many there are, where labels are class numbers, got None")
        labels = torch.nn.functional.one_hot(labels, num_classes).float()
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape [N, K] or [N], got {list(labels.shape)}")
    sources, weights = mix_weights(record, out_size)
    return (weights.to(labels.dtype)[:, :, None] * labels[sources]).sum(1)
