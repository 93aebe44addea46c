"""CUDA graphs: what was recorded runs again, in the buffers that it was recorded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.stand_in import counts
from tests.stand_in.counts import uncounted


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Recorder(TorchDispatchMode):
    """Each operator call with its results, and the memory from before the capture that it has written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.made: dict[int, Tensor] = {}  # by storage, whole storages as bytes
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # likewise, and what was there before

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_storage(t) for t in _tensors((args, kwargs))}
        with uncounted():
            for tensor in self._to_be_written(function, args, kwargs):
                if (key := _storage(tensor)) not in self.made and key not in self.written:
                    whole = _bytes_of(tensor)
                    self.written[key] = (whole, whole.clone())
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        with uncounted():
            for tensor in _tensors(out):
                if (key := _storage(tensor)) not in given and tensor.is_cuda:
                    self.made.setdefault(key, _bytes_of(tensor))
        return out

    @staticmethod
    def _to_be_written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
        schema = function._schema.arguments
        values = dict(zip((each.name for each in schema), args, strict=False)) | kwargs
        return _tensors([values.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class CUDAGraph:
    """On a device a capture computes nothing, here it must. So that nobody sees it, what the capture made is
    overwritten by NaN (in bytes: all ones) when it ends, and what it wrote to older memory is undone."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder: _Recorder | None = None
        self._device = -1
        self._generators = [torch.ops.stand_in.default_generator(index) for index in range(torch.cuda.device_count())]
        self._states: list[Tensor] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._generators.append(generator)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        torch.ops.stand_in.begin_capture(capture_error_mode == "global")
        self._register_generators(True)
        counts.captures += 1
        self._device = torch.cuda.current_device()
        self._states = [generator.get_state() for generator in self._generators]
        self._recorder = _Recorder()
        self._recorder.__enter__()

    @torch.no_grad()
    def capture_end(self) -> None:
        assert self._recorder is not None
        self._recorder.__exit__(None, None, None)
        self._register_generators(False)
        torch.ops.stand_in.end_capture()
        with uncounted():
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)
            for whole, before in self._recorder.written.values():
                whole.copy_(before)
            for whole in self._recorder.made.values():
                whole.fill_(255)

    @torch.no_grad()
    def replay(self) -> None:
        if self._recorder is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        counts.replays += 1
        with uncounted(), torch.cuda.device(self._device), torch.autocast("cuda", enabled=False):
            for function, args, kwargs, out in self._recorder.calls:
                again = function(*args, **kwargs)
                for old, new in zip(_tensors(out), _tensors(again), strict=True):
                    if _storage(old) != _storage(new):
                        old.copy_(new)

    def _register_generators(self, registered: bool) -> None:
        for generator in self._generators:
            torch.ops.stand_in.register_generator(generator, registered)

    def reset(self) -> None:
        self._recorder = None

    def pool(self) -> tuple[int, int]:
        return (0, id(self))
