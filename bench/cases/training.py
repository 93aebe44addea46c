"""Students that are trained at once, and the experts' trajectories that matching reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .. import ours
from ..case import (
    CONVNET,
    GATE,
    SMALL,
    Case,
    Check,
    Config,
    Entry,
    Medians,
    Point,
    check_float32,
    gate_float64,
    step_must_show,
)
from ..peers import segments, training


def _training_points(case: Case, config: Config) -> list[Point]:
    problem = partial(training.make_training, config)
    return [Point(config["students"], problem, tuple(case.providers), per=config["epochs"])]


def _training_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small, in batches, so that a student's order of the images counts: to 1e-10."""
    problem = training.make_training(config["gate"]).double()
    truths = training.prepare_eager(problem)()
    yield from gate_float64(case, problem, truths)


def _training_check(
    case: Case, point: Point, problem: training.Training, outputs: dict[str, training.Trained]
) -> Iterator[Check]:
    """At the timed size and precision: 5e-3, or twice the baseline's own distance from float64."""
    truths = training.prepare_eager(problem.double())()
    yield from check_float32(case, outputs, truths, 5e-3)


TRAIN_STUDENTS = Case(
    name="train_students",
    metric="time per epoch of all students",
    unit="s",
    x_name="students",
    providers={
        "eager": Entry(training.prepare_eager),
        "compiled": Entry(training.prepare_compiled),
        "compiled-vmap": Entry(training.prepare_vmapped),
        "pydistill": Entry(ours.train_students),
    },
    # epochs are alike: a hundred take a hundred times as long as one
    full={**CONVNET, "students": 5, "epochs": 2, "lr": 0.01, "gate": {**GATE, "students": 3, "epochs": 3}},
    quick={**SMALL, "students": 3, "epochs": 2, "lr": 0.01, "gate": {**GATE, "students": 3, "epochs": 3}},
    repeats=5,
    points=_training_points,
    gate=_training_gate,
    check=_training_check,
    must_show=partial(step_must_show, {("pydistill", "eager"): 3.0, ("pydistill", "compiled*"): 1.2}),
    brief_providers=("eager", "compiled", "pydistill"),
)


def _store_points(case: Case, config: Config) -> list[Point]:
    read, opened = config["read"][0], config["opened"][0]
    return [
        Point(read, partial(segments.make_experts, config), tuple(case.providers), "random segment"),
        Point(opened, partial(segments.make_experts, config, opens=True), ("pydistill",), "open"),
    ]


def _is_truth(name: str, what: str, found: segments.Segment, truth: segments.Segment) -> Iterator[Check]:
    for end, a, b in zip(segments.Segment._fields, found, truth, strict=True):
        yield Check(name, f"{what}, {end}, equal bits", float(torch.equal(a, b)), 1.0, at_least=True)


def _store_gate(case: Case, config: Config) -> Iterator[Check]:
    """A small file, some segments, bit for bit."""
    problem = segments.make_experts({**config, **config["gate"]})
    for name, entry in case.providers.items():
        read = entry.prepare(problem)
        for place, _ in zip(problem.places(), range(20), strict=False):
            yield from _is_truth(name, f"segment {place}", read(), problem.truth(*place))


def _store_check(case: Case, point: Point, problem: segments.Experts, outputs: dict[str, Any]) -> Iterator[Check]:
    for name, output in outputs.items():
        if problem.opens:
            right = output.shape == (problem.experts, problem.epochs + 1, problem.numel)
            yield Check(name, "the opened store's shape", float(right), 1.0, at_least=True)
        else:
            yield from _is_truth(name, "first segment", output, problem.truth(*next(problem.places())))


def _store_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    found = {(mode, provider): value for (mode, _, provider), value in medians.items()}
    speedup = found["random segment", "torch.load"] / found["random segment", "pydistill"]
    yield Check("pydistill", "speed-up over torch.load of the file", speedup, 50.0, at_least=True)
    yield Check("pydistill", "ms to open", found["open", "pydistill"], 10.0)


EXPERT_STORE = Case(
    name="expert_store",
    metric="time",
    unit="ms",
    x_name="experts",
    providers={
        "torch.load": Entry(segments.prepare_load),
        "torch.load-mmap": Entry(partial(segments.prepare_load, mmap=True)),
        "pydistill": Entry(ours.expert_store),
    },
    # experts, epochs; the store that is merely opened has no data
    full={**CONVNET, "length": 2, "read": (10, 50), "opened": (100, 50), "gate": {**SMALL, "read": (3, 4)}},
    quick={**SMALL, "length": 2, "read": (3, 4), "opened": (5, 6), "gate": {**SMALL, "read": (3, 4)}},
    repeats=20,
    points=_store_points,
    gate=_store_gate,
    check=_store_check,
    must_show=_store_must_show,
)
