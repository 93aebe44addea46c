"""Two CUDA devices that are not there: ``torch.cuda`` with them, on a torch that is built without CUDA.

The operators are registered when the library is loaded, which is for good. It has to be before the process's first
``backward()``, whose device threads are started once; so a process that tests on devices does nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.stand_in.graphs import CUDAGraph

DEVICES = 2
_CUDA = 1  # c10::DeviceType::CUDA
_BYTES = 1 << 34  # of memory


def load(library: Path) -> None:
    """From now on there are tensors on "cuda:0" and "cuda:1"."""
    torch.ops.load_library(str(library))
    # A device's thread may still hold the last backward pass, and asks for the interpreter to let go of it. Where that
    # has begun to end, the process aborts.
    atexit.register(time.sleep, 0.05)


def _index(device: Any = None) -> int:
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    return torch.accelerator.current_device_index() if index is None or index < 0 else index


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **kept: Any) -> Stream:
        if kept:  # numbers of a stream that there is
            return super().__new__(cls, **kept)
        return super().__new__(cls, torch.device("cuda", _index(device)), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


class Event(torch.Event):
    def __new__(cls, enable_timing: bool = False, **kept: bool) -> torch.Event:
        # not one of this class: elapsed_time takes no subclass's
        return torch.Event("cuda", enable_timing=enable_timing, **kept)


def _exchange(index: int) -> int:
    return torch._C._accelerator_exchangeDevice(index) if index >= 0 else -1


def _properties(device: Any = None) -> SimpleNamespace:
    if not 0 <= _index(device) < DEVICES:
        raise AssertionError("Invalid device id")
    return SimpleNamespace(
        name="stand-in for a CUDA device",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=_BYTES,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=227 * 1024,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
    )


def _memory_stats(index: int) -> dict[str, Any]:
    allocated, peak, reserved = torch.ops.stand_in.memory(index)

    def of(current: int, most: int) -> dict[str, dict[str, int]]:
        return {"all": {"current": current, "peak": most, "allocated": most, "freed": most - current}}

    return {"allocated_bytes": of(allocated, peak), "reserved_bytes": of(reserved, reserved)}


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    return _BYTES - torch.ops.stand_in.memory(_index(device))[0], _BYTES


def _new_storage(cls: type, *args: Any, device: Any = None, **kept: Any) -> torch.UntypedStorage:
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(cls, *args, **({} if device is None else {"device": device}), **kept)
    return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()


@contextlib.contextmanager
def devices() -> Iterator[None]:
    """``torch.cuda`` reports and steers the two devices; afterwards it is what it was.

    Its modules bind what a build with CUDA has in ``torch._C`` by name, so that is put there.
    """
    built = {
        "_cuda_getDeviceCount": lambda: DEVICES,
        "_cuda_getDevice": torch._C._accelerator_getDeviceIndex,
        "_cuda_setDevice": torch._C._accelerator_setDeviceIndex,
        "_cuda_synchronize": lambda: torch.accelerator.synchronize(),
        "_cuda_getCurrentStream": lambda index: (torch.accelerator.current_stream(index).stream_id, index, _CUDA),
        "_cuda_getDefaultStream": lambda index: (0, index, _CUDA),
        "_cuda_getCurrentRawStream": lambda index: torch.accelerator.current_stream(index).stream_id,
        "_cuda_setStream": lambda **stream: torch._C._accelerator_setStream(torch.Stream(**stream)),
        "_cuda_emptyCache": torch.ops.stand_in.empty_cache,
        "_cuda_resetPeakMemoryStats": torch.ops.stand_in.reset_peak,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_isCurrentStreamCapturing": torch.ops.stand_in.is_capturing,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getDriverVersion": lambda: 13000,
        "_host_emptyCache": lambda: None,
    }
    made = {
        "_initialized": True,
        "_cached_device_count": DEVICES,
        "_exchange_device": _exchange,
        "_maybe_exchange_device": _exchange,
        "get_device_properties": _properties,
        "mem_get_info": _mem_get_info,
        "default_generators": tuple(torch.ops.stand_in.default_generator(index) for index in range(DEVICES)),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": torch.ops.stand_in.is_capturing,
    }
    with (
        mock.patch.multiple(torch._C, create=True, **built),
        mock.patch.multiple(torch.cuda, **made),
        mock.patch.object(torch.cuda.graph, "default_capture_stream", None),
        mock.patch.object(torch.UntypedStorage, "__new__", _new_storage),
    ):
        yield
