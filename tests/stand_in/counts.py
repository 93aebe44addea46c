"""Counts what a GPU would be asked for, and forbids that the host waits for it."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[2] / "pydistill"

captures = replays = 0  # of this process's graphs, see graphs.py


@dataclass
class Counts:
    """Of a block of code: what was asked of the devices between its begin and its end."""

    waits: list[str] = field(default_factory=list)  # why the host waited, in this order
    launches: int = 0  # calls that launch kernels; a replay of a graph is none
    copies: int = 0  # between host and device
    allocations: int = 0
    captures: int = 0
    replays: int = 0
    # where in the package operators made the host wait; waits in torch.tensor and for streams are in no operator
    places: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        numbers = f"{self.launches} launches, {self.copies} copies, {self.captures} captures, {self.replays} replays"
        places = "".join(f"\n  {number} at {place}" for place, number in self.places.items())
        return f"{len(self.waits)} waits {dict(Counter(self.waits))}, {numbers}{places}"


class _Places(TorchDispatchMode):
    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        before = torch.ops.stand_in.numbers()[-1]
        out = function(*args, **(kwargs or {}))
        if torch.ops.stand_in.numbers()[-1] > before:
            self.places[f"{_caller()} {function}"] += 1
        return out


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if PACKAGE in Path(frame.filename).parents:
            return f"{Path(frame.filename).relative_to(PACKAGE.parent)}:{frame.lineno}"
    return "outside of the package:"


@contextlib.contextmanager
def counts() -> Iterator[Counts]:
    """``with counts() as c: ...``, and then ``c.waits``, ``c.launches`` and the like of the block."""
    found = Counts()
    before, begun = torch.ops.stand_in.numbers(), (captures, replays)
    waits = len(torch.ops.stand_in.waits())
    try:
        with _Places(found.places):
            yield found
    finally:
        after = torch.ops.stand_in.numbers()
        found.launches, found.copies, found.allocations = (b - a for a, b in zip(before[:3], after[:3], strict=True))
        found.captures, found.replays = captures - begun[0], replays - begun[1]
        found.waits = torch.ops.stand_in.waits()[waits:]


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """A wait of the host is a RuntimeError where it happens."""
    before = torch.ops.stand_in.forbid_waits(True)
    try:
        yield
    finally:
        torch.ops.stand_in.forbid_waits(before)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What happens here is not counted, and nothing is forbidden."""
    before = torch.ops.stand_in.pause(True)
    try:
        yield
    finally:
        torch.ops.stand_in.pause(before)
