"""The ``replay_buffer_*.pt`` files in which the code of MTT, TESLA, FTD and others keeps experts.

Such a file is a list of experts, an expert a list of epochs + 1 snapshots, a snapshot a list of float32 tensors in
``net.parameters()`` order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pydistill._atomic import replacing, sync
from pydistill._torch_files import read_torch

__all__ = ["check_replay_buffers", "read_replay_buffer", "replay_buffer_shapes", "write_replay_buffer"]

Parameters = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes

_WANTED = "a replay buffer: a list of experts, each a list of snapshots, each a list of tensors"


def check_replay_buffers(paths: Sequence[Path], parameters: Parameters) -> tuple[int, int]:
    """How many experts the files hold in total, and how many snapshots each expert has.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: a file is truncated, foreign or damaged, does not fit the parameters or the first file, or holds
            experts that cannot be matched: with non-finite numbers, or with an epoch that changed nothing; says where.
    """
    experts, snapshots = 0, None
    for path in paths:
        buffer = _load(path)
        snapshots = len(buffer[0]) if snapshots is None else snapshots
        _check(path, buffer, parameters, snapshots)
        experts += len(buffer)
    assert snapshots is not None  # for there is a file
    return experts, snapshots


def replay_buffer_shapes(path: Path) -> list[tuple[int, ...]]:
    """The shapes of the parameters in a file, by its first snapshot; errors are those of `check_replay_buffers`."""
    snapshot = _load(path, verified=True)[0][0]  # the numbers are verified when they are read
    if not snapshot or not all(isinstance(tensor, Tensor) for tensor in snapshot):
        raise ValueError(f"{path}: expected {_WANTED}; got something else")
    return [tuple(tensor.shape) for tensor in snapshot]


def read_replay_buffer(path: Path) -> Iterator[Tensor]:
    """The flat snapshots of a checked file: epoch by epoch, those of all its experts, float32 ``[E, P]``."""
    for snapshots in zip(*_load(path, verified=True), strict=True):
        yield torch.stack([torch.cat([tensor.reshape(-1) for tensor in snapshot]) for snapshot in snapshots])


def write_replay_buffer(path: Path, experts: Iterable[Iterable[Tensor]], parameters: Parameters) -> None:
    """Writes experts, each an iterable of flat snapshots ``[P]``, as one file, atomically."""
    sizes = [math.prod(shape) for _, shape in parameters]
    buffer = []
    for expert in experts:
        split = (snapshot.split(sizes) for snapshot in expert)
        buffer.append(
            [[p.view(shape).clone() for p, (_, shape) in zip(each, parameters, strict=True)] for each in split]
        )
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(buffer, file)
        sync(file)


def _load(path: Path, verified: bool = False) -> list[list[list[Tensor]]]:
    buffer = read_torch(path, _WANTED, mmap=True, verified=verified)
    lists = isinstance(buffer, list) and buffer and all(isinstance(expert, list) and expert for expert in buffer)
    if not lists or not all(isinstance(snapshot, list) for expert in buffer for snapshot in expert):
        raise ValueError(f"{path}: expected {_WANTED}; got something else")
    return buffer


def _check(path: Path, buffer: list[list[list[Tensor]]], parameters: Parameters, snapshots: int) -> None:
    if snapshots < 2:
        raise ValueError(f"{path}: expected experts of at least 2 snapshots, got {snapshots}")
    for i, expert in enumerate(buffer):
        if len(expert) != snapshots:
            raise ValueError(f"{path}: expert {i}: expected {snapshots} snapshots as the first has, got {len(expert)}")
        for t, snapshot in enumerate(expert):
            place = f"{path}: expert {i}, snapshot {t}"
            if len(snapshot) != len(parameters):
                raise ValueError(f"{place}: expected {len(parameters)} tensors as net has, got {len(snapshot)}")
            for (name, shape), tensor in zip(parameters, snapshot, strict=True):
                if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.shape != shape:
                    is_tensor = isinstance(tensor, Tensor)
                    got = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else type(tensor).__name__
                    raise ValueError(f"{place}: {name}: expected torch.float32 {list(shape)}, got {got}")
                if not tensor.isfinite().all():
                    raise ValueError(f"{place}: {name}: expected finite numbers, got some that are not")
        for t, (before, after) in enumerate(pairwise(expert)):
            if all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
                shared = before[0].data_ptr() == after[0].data_ptr()
                why = "they are the same tensors, which training on a CPU keeps changing: clone them" if shared else ""
                raise ValueError(
                    f"{path}: expert {i}: expected an epoch to change its parameters, snapshots {t} and {t + 1} are "
                    f"equal{why and f' ({why})'}"
                )
