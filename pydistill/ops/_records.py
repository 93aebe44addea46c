"""Shared by the operators that sample images by a record of parameters: the checks of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydistill.ops._rows import DTYPES

MAX_SIZE = 16384  # pixels a side


def check_images(images: Any, record: Any, shape: str, **others: Any) -> None:
    """Raises unless all are tensors, of the right dtypes, and the images of ``shape``: "[N, C, H, W]" or the like."""
    for name, tensor in {"images": images, "record": record, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if images.dtype not in DTYPES:
        raise TypeError(f"images: expected float32, float64, bfloat16 or float16, got {images.dtype}")
    if record.dtype != torch.float32:
        raise TypeError(f"record: expected float32, got {record.dtype}")
    if images.dim() != 4 or 0 in images.shape[1:] or max(images.shape[2:]) > MAX_SIZE:
        raise ValueError(
            f"images: expected {shape} with C >= 1 and sides of 1 to {MAX_SIZE}, got shape {list(images.shape)}"
        )


def check_constant(record: Tensor, images: Tensor) -> None:
    """Raises ``ValueError`` for a record on another device, or one that asks for a gradient."""
    if record.device != images.device:
        raise ValueError(f"record: expected device {images.device} as images, got {record.device}")
    if record.requires_grad:
        raise ValueError("record: expected a constant, got a tensor that requires a gradient; there is none")
