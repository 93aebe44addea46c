"""The ``replay_buffer_*.pt`` in which the code of MTT, TESLA, FTD and others keeps experts.

Such a file is a list of experts, an expert a list of epochs + 1 snapshots, a snapshot a list of float32 tensors in
``net.parameters()`` order.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pydistill._atomic import replacing, sync

__all__ = ["check_replay_buffers", "read_replay_buffer", "write_replay_buffer"]

Parameters = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes

_WANTED = "a replay buffer: a list of experts, each a list of snapshots, each a list of tensors"


def check_replay_buffers(paths: Sequence[Path], parameters: Parameters) -> tuple[int, int]:
    """How many experts some files hold together, and how many snapshots each of them has.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: a file is truncated, foreign, or does not fit the parameters or the first file; says where.
    """
    experts, snapshots = 0, None
    for path in paths:
        buffer = _load(path)
        snapshots = len(buffer[0]) if snapshots is None else snapshots
        _check(path, buffer, parameters, snapshots)
        experts += len(buffer)
    return experts, snapshots


def read_replay_buffer(path: Path) -> Iterator[Tensor]:
    """The flat snapshots of a checked file: of each epoch in turn those of all its experts, float32 ``[E, P]``."""
    for snapshots in zip(*_load(path), strict=True):
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


def _load(path: Path) -> list[list[list[Tensor]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {_WANTED}; found no file")
    try:
        # files of torch before 1.6 are no zip files, and cannot be mapped
        buffer = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a foreign stream makes the unpickler raise almost anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected {_WANTED}; it is truncated or foreign ({reason})") from error
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
