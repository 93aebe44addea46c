"""Ranks that each have one of the devices: NCCL's place is taken by gloo, on the same memory.

``torchrun -m stand_in.ranks METHOD FOLDER`` runs a method on both, for `on_devices_ranks.py`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

_init = dist.init_process_group


class _OverGloo(dist.ProcessGroup):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "stand_in"

    def allreduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        for tensor in tensors:
            # as NCCL: a rank's tensors are on its own device
            assert tensor.device == torch.device("cuda", self.rank()), tensor.device
        return self._gloo.allreduce([torch.ops.stand_in.on_host(tensor) for tensor in tensors], opts)

    def barrier(self, opts: Any) -> dist.Work:
        return self._gloo.barrier(opts)


@contextlib.contextmanager
def nccl() -> Iterator[None]:
    """``init_process_group("nccl")`` is understood."""
    if not hasattr(dist.Backend, "STAND_IN"):
        dist.Backend.register_backend("stand_in", _OverGloo, devices=["cuda"])

    def init_process_group(backend: str, **options: Any) -> None:
        _init("stand_in" if backend == "nccl" else backend, **options)

    with mock.patch.object(dist, "init_process_group", init_process_group):
        yield


TINY = {"width": 4, "depth": 2, "image_size": 8, "students": 1, "student_epochs": 1, "whole_epochs": 1}


def run_method(name: str, folder: Path) -> None:
    from pydistill.methods import DM, MTT, run

    if name == "mtt":
        matching = {"ipc": 1, "iterations": 2, "syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 1, "segments": 2}
        run(MTT(**matching), out=folder, device="cuda", num_experts=2, train_epochs=2, **TINY)
    else:
        run(DM(ipc=1, iterations=2, batch_real=4), out=folder, device="cuda", **TINY)


if __name__ == "__main__":
    import stand_in.plugin  # noqa: F401, the devices, before the package is imported

    from tests.stand_in.devices import devices

    with devices(), nccl():
        run_method(sys.argv[1], Path(sys.argv[2]))
