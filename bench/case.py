"""A benchmark case: what is timed against what, what must be correct before that, and what the result must show.

A case owns its configuration, its providers (the first is the baseline of every ratio), its points (what is measured)
and its two gates: `gate` on a small problem in float64, where every digit counts, and `check` on the outputs of
exactly the thunks that are about to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .peers.problem import Problem

Config = dict[str, Any]


SIZES = ("full", "brief", "quick")  # quick: tiny, only shows that a case works


class Provider(Protocol):
    """Turns a problem into the thunk to be measured."""

    def __call__(self, problem: Any) -> Callable[[], Any]: ...


@dataclass(frozen=True)
class Entry:
    prepare: Provider
    mode: str = ""  # which quantity it computes, if a case's providers differ in that
    precision: str = "fp32"  # "bf16" has its own check, and no gate in float64


@dataclass(frozen=True)
class Check:
    """One line of a gate, or one bound that a result must satisfy."""

    subject: str
    what: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def ok(self) -> bool:
        # NaN fails either way
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "ok" if self.ok else "MISSED"
        return f"{verdict}: {self.subject}, {self.what}: {self.value:.3g} (must be {sign} {self.bound:.3g})"


@dataclass(frozen=True)
class Point:
    """One place on the x axis, with the providers measured there."""

    x: int | str
    problem: Callable[[], Any]
    providers: tuple[str, ...]
    mode: str = ""
    per: int = 1  # what a measurement is divided by, e.g. the number of inner steps


# (mode, x, provider) -> median
Medians = Mapping[tuple[str, Any, str], float]


@dataclass(frozen=True)
class Case:
    name: str
    metric: str
    unit: str  # "s", "ms": timed; "MiB": peak memory, measured in a subprocess; "B": what `measure` gives
    x_name: str
    providers: dict[str, Entry]
    full: Config
    quick: Config
    repeats: int
    points: Callable[[Case, Config], list[Point]]
    gate: Callable[[Case, Config], Iterator[Check]]
    check: Callable[[Case, Point, Any, dict[str, Any]], Iterator[Check]]
    must_show: Callable[[Medians, Config], Iterator[Check]] = field(default=lambda medians, config: iter(()))
    brief: Config = field(default_factory=dict)  # what `pydistill bench` changes in `full`, to finish in minutes
    brief_providers: tuple[str, ...] = ()  # the providers that it measures; empty: all
    lines: bool = False  # whether cost should grow along a straight line in x, by mode
    measure: Callable[[Callable[[], Any]], float] | None = None  # of a thunk, if not its time
    problem: Callable[[Config, int], Problem] | None = None  # how a memory subprocess rebuilds a point's problem

    @property
    def baseline(self) -> str:
        return next(iter(self.providers))

    def config(self, size: str) -> Config:
        """``size``: one of `SIZES`."""
        return {"full": self.full, "brief": {**self.full, **self.brief}, "quick": self.quick}[size]

    def only(self, names: Sequence[str]) -> Case:
        """The case with its baseline and those named providers that it has."""
        kept = {name: entry for name, entry in self.providers.items() if name in names or name == self.baseline}
        return replace(self, providers=kept)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in L2."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm())


def gate_float64(
    case: Case, problem: Any, truths: Sequence[Tensor], where: str = "", bound: float = 1e-10
) -> Iterator[Check]:
    """What the providers that compute in float32 make of a small problem in float64; ``where`` begins each line."""
    for name, entry in case.providers.items():
        if entry.precision == "fp32":
            for what, value, truth in zip(_names(truths), entry.prepare(problem)(), truths, strict=True):
                yield Check(name, f"float64 {where}{what}, relative error", relative_error(value, truth), bound)


def check_float32(
    case: Case, outputs: dict[str, Any], truths: Sequence[Tensor], floor: float, where: str = ""
) -> Iterator[Check]:
    """The outputs that are timed: ``floor``, or twice the baseline's own distance from float64."""
    for i, (what, truth) in enumerate(zip(_names(truths), truths, strict=True)):
        bound = max(floor, 2 * relative_error(outputs[case.baseline][i], truth))
        for name, values in outputs.items():
            yield Check(name, f"float32 {where}{what}, relative error", relative_error(values[i], truth), bound)


def _names(values: Sequence[Tensor]) -> Sequence[str]:
    return getattr(values, "_fields", [f"output {i}" for i in range(len(values))])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


CONVNET: Config = {
    **{"channels": 3, "classes": 10, "width": 128, "depth": 3, "image_size": 32},
    **{"images": 100, "batch": 100},
}


SMALL: Config = {
    **{"channels": 3, "classes": 4, "width": 8, "depth": 2, "image_size": 10},
    **{"images": 6, "batch": 4},
}


GATE: Config = {**SMALL, "image_size": 18, "depth": 3, "steps": 5, "lr": 0.05}


def step_must_show(bounds: dict[tuple[str, str], float], medians: Medians, config: Config) -> Iterator[Check]:
    """``bounds``: by provider and the peer that it must beat; "compiled*": the fastest of the float32 ones."""
    values = {provider: value for (_, _, provider), value in medians.items()}
    compiled_values = [v for name, v in values.items() if name.startswith("compiled") and name != "compiled-bf16"]
    if compiled_values:
        values["compiled*"] = min(compiled_values)
    for (provider, peer), bound in bounds.items():
        if provider in values and peer in values:
            speedup = values[peer] / values[provider]
            yield Check(provider, f"speed-up over {peer}", speedup, bound, at_least=True)


def r_squared(points: Mapping[float, float]) -> float:
    """Of a straight line through (x, y): 1 - residual / total variance."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (list(points), list(points.values())))
    A = torch.stack([x, torch.ones_like(x)], 1)
    residual = y - A @ torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    return float(1 - residual.square().sum() / (y - y.mean()).square().sum())
