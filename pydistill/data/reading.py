"""Batches of an image source, decoded ahead by a data loader's workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pydistill.data.sources import ImageSource

__all__ = ["check_workers", "cores", "read_ahead"]


def read_ahead(
    source: ImageSource, batches: Sequence[Tensor], workers: int, *, skip_damaged: bool = False
) -> Iterator[tuple[Tensor, dict[int, str]]]:
    """The images of each batch of indices in turn, uint8 ``[B, C, H, W]``, whatever the number of workers.

    Args:
        source: where from.
        batches: int64 ``[B]`` each.
        workers: processes that read ahead, two batches each, if the source decodes. They end with the iterator.
        skip_damaged: leave a damaged picture black and give, beside the images, a message by its place in the batch.

    Raises:
        ValueError, OSError: from reading, as if this process had read.
    """
    reads = _Reads(source, skip_damaged)
    if not workers or not source.decodes:
        yield from map(reads.read, batches)
        return
    # a generator of its own: a loader without one draws from torch's; and it draws where torch's default device is
    with torch.device("cpu"):
        options: dict[str, Any] = {"num_workers": min(workers, len(batches)), "generator": torch.Generator("cpu")}
        ahead = iter(DataLoader(reads, None, sampler=batches, **options))
    try:
        for found in ahead:
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        del ahead  # the workers end with it, also where a traceback keeps this frame


class _Reads(Dataset[Any]):
    """Batches by their indices; an error is given back, since a loader would raise it with a worker's traceback."""

    def __init__(self, source: ImageSource, skip_damaged: bool):
        self.source, self.skip_damaged = source, skip_damaged

    def read(self, indices: Tensor) -> tuple[Tensor, dict[int, str]]:
        damaged: dict[int, str] = {}
        images = self.source.read(indices, damaged if self.skip_damaged else None)
        return torch.from_numpy(images), damaged

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, dict[int, str]] | Exception:
        try:
            return self.read(indices)
        except (ValueError, OSError) as error:
            return error


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int) -> None:
    """ValueError for a negative number of workers, or for more than there are cores."""
    if not 0 <= workers <= cores():
        raise ValueError(f"workers: expected 0 to {cores()}, the cores that this process may use, got {workers}")
