"""Modules under their old names: importing one warns, and will be an error in 1.0."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_ROOMS = {
    "decoupled": ("cda", "dwa", "hello", "infer", "post_train", "relabel", "squeeze", "sre2l"),
    "matching": ("atom", "datadam", "dc", "dm", "dsa", "fedlgd", "krr_st", "pairs"),
    "networks": ("self_supervised", "unip"),
    "selection": ("dq", "pca", "picking"),
    "trajectory": ("ast", "datm", "ftd", "fyi", "mtt", "rat_bptt", "tesla"),
}
MOVED = {f"pydistill.methods.{name}": f"pydistill.methods.{room}.{name}" for room, of in _ROOMS.items() for name in of}


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now; the old name goes with 1.0", DeprecationWarning, stacklevel=2)
        found = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})


FINDER = _Moved()
