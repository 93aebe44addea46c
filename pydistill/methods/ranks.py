"""The processes that share a run's work, as started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["joined", "sum_over_ranks", "wait_for_ranks", "world"]


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the ranks, in one exchange."""
    if world()[1] == 1:
        return tensors
    joined = torch.cat([t.detach().flatten() for t in tensors])
    torch.distributed.all_reduce(joined)
    parts = joined.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def wait_for_ranks() -> None:
    """Waits until every rank is here."""
    if world()[1] > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, for the block; an existing group is used."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world()[1] > 1:
        yield
        return
    on_gpus = device.type == "cuda"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
