"""The package's kernels on the devices: emulated, which is true to every thread and slow, or borrowed from the CPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.stand_in import building
from tests.stand_in.counts import uncounted

MODULE = "pydistill._C_cuda"


class _Finder(importlib.abc.MetaPathFinder):
    """Where the package looks for its CUDA operators, there is ``library``."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        return importlib.machinery.ModuleSpec(name, None, origin=str(self.library))


def _import_package(library: Path) -> None:
    assert "pydistill" not in sys.modules, "the package has looked for its CUDA operators already"
    torch.version.cuda = "13.0"
    sys.meta_path.insert(0, _Finder(library))
    built = importlib.import_module("pydistill._library")._build
    built |= {"cuda_architectures": "90-real", "cuda_toolkit": torch.version.cuda}


def emulate() -> None:
    """CUDA kernels run on the host machine of ``cuda_vocabulary.h``, Triton's in its interpreter (TRITON_INTERPRET=1,
    if they are to run)."""
    _import_package(building.operators_library())
    _interpret()


def leave_out() -> None:
    """There is no library of CUDA kernels, as in a build without them: Triton's run in its interpreter."""
    torch.version.cuda = "13.0"
    assert importlib.util.find_spec(MODULE) is None  # which imports the package
    _interpret()


def _interpret() -> None:
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        # what a GPU would say: the interpreter itself copies the arguments to the host and back
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                torch.ops.stand_in.launch(tensor.device.index)
                break
        if any(size > 65535 for size in self.grid[1:]):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {self.grid}")
        if not _left_out:
            with uncounted():
                run(self, *args, **kwargs)

    mock.patch.object(GridExecutor, "__call__", launch).start()


_left_out: list[bool] = []


@contextlib.contextmanager
def triton_left_out() -> Iterator[None]:
    """Triton's kernels are launched, but not run: for sizes that the interpreter is too slow for."""
    _left_out.append(True)
    try:
        yield
    finally:
        _left_out.pop()


def borrow(library: Path) -> None:
    """The CPU's kernels answer for those of CUDA and of Triton. ``library``: one that is loaded anyhow, in place of the
    package's CUDA operators."""
    _import_package(library)
    import pydistill.ops

    for module in pkgutil.iter_modules(pydistill.ops.__path__):
        importlib.import_module(f"pydistill.ops.{module.name}")
    for name in cuda_operators() + triton_operators():
        torch.ops.stand_in.borrow(name)


def cuda_operators() -> list[str]:
    """The operators that have CUDA kernels."""
    sources = "".join(path.read_text() for path in building.cuda_sources())
    return [f"pydistill::{name}" for name in re.findall(r'm\.impl\("(\w+)"', sources)]


def triton_operators() -> list[str]:
    names: Sequence[str] = torch._C._dispatch_get_all_op_names()
    return [name for name in names if name.startswith("pydistill_triton::")]


KERNELS: dict[str, Callable[[], None]] = {
    "emulated": emulate,
    "left out": leave_out,
    "borrowed": lambda: borrow(building.devices_library()),
}
