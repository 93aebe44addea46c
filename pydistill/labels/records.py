"""Records of `pydistill.ops.multi_crop` in the rows of a label store."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydistill.augment.record import HEADER, MAGIC, PACKED, record_from_bytes, record_to_bytes

__all__ = ["CROP_BYTES"]

CROP_BYTES = PACKED.itemsize  # per part; mixup and cutmix take two parts


def pack(record: Tensor) -> np.ndarray:
    """float32 ``[B, P, 14]`` as uint8 ``[B, P * CROP_BYTES]``; errors as for `pydistill.augment.record_to_bytes`."""
    data = np.frombuffer(record_to_bytes(record), np.uint8, offset=HEADER.size)
    return data.reshape(len(record), record.shape[1] * CROP_BYTES)


def unpack(rows: Tensor) -> Tensor:
    """The inverse of `pack`, to the bit."""
    parts, rest = divmod(rows.shape[1], CROP_BYTES)
    if rest or not parts:
        raise ValueError(f"records: expected {CROP_BYTES} bytes a part as multi_crop's have, got {rows.shape[1]}")
    return record_from_bytes(HEADER.pack(MAGIC, len(rows), parts) + rows.numpy().tobytes())


def crop_record(
    crops: Tensor, flips: Tensor, sources: Tensor, out_size: int, alpha: float = 1.0, box: tuple[int, ...] | None = None
) -> Tensor:
    """Parts of records, float32 ``[B, 14]``: crops ``[B, 4]`` (top, left, height, width) seen in a box of the result.

    Args:
        crops, flips, sources: of each part.
        out_size: height and width of the results.
        alpha: of painting.
        box: first and last + 1 row, first and last + 1 column; by default all.
    """
    top, bottom, left, right = box or (0, out_size, 0, out_size)
    place = torch.tensor(
        [0, 0, 0, top, left, bottom - top, right - left, alpha], dtype=torch.float32, device="cpu"
    )  # no roll, no fit
    named = torch.cat([sources[:, None].float(), crops.float(), flips[:, None].float()], 1)
    return torch.cat([named, place.expand(len(crops), -1)], 1)
