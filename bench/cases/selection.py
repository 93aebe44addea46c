"""Choosing real images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import ours
from ..case import Case, Check, Config, Entry, Medians, Point
from ..peers import selection


def _graph_cut_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(
            config["samples"], partial(selection.make_samples, config, mode == "gradients"), tuple(case.providers), mode
        )
        for mode in ("features", "gradients")
    ]


def _graph_cut_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, few samples: every provider picks what the loop picks, in its order."""
    for with_factors in (False, True):
        problem = selection.make_samples({**config, **config["gate"]}, with_factors, torch.float64)
        truth = selection.loop(problem)()
        for name, entry in case.providers.items():
            different = int((entry.prepare(problem)() != truth).sum())
            yield Check(name, "float64, picks that are not the loop's", different, 0)


def _graph_cut_check(
    case: Case, point: Point, problem: selection.Samples, outputs: dict[str, Tensor]
) -> Iterator[Check]:
    """At the timed size, against float64: ours pick by pick; numpy's in float32 as a set, up to 1 % of it.

    The sums of the loop have an error of about 1e-2 in float32, and gains are closer than that.
    """
    truth = selection.rows(problem.double())()
    for name, picks in outputs.items():
        if name == "pydistill":
            yield Check(name, "picks that are not those of float64", int((picks != truth).sum()), 0)
        else:
            strange = int((~torch.isin(picks, truth)).sum())
            yield Check(name, "share of picks that float64 has not", strange / len(truth), 0.01)


def _graph_cut_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for mode in ("features", "gradients"):
        found = {provider: value for (m, _, provider), value in medians.items() if m == mode}
        if "pydistill" in found:
            speedup = found["loop"] / found["pydistill"]
            yield Check("pydistill", f"{mode}, speed-up over the loop", speedup, 100.0, at_least=True)


GRAPH_CUT_GREEDY = Case(
    name="graph_cut_greedy",
    metric="time of all picks",
    unit="s",
    x_name="samples",
    providers={
        "loop": Entry(selection.loop),
        "rows": Entry(selection.rows),
        "pydistill": Entry(ours.graph_cut_greedy),
    },
    full={
        **{"samples": 10_000, "picks": 1000, "features": 512, "classes": 10},
        "gate": {"samples": 300, "picks": 60, "features": 24, "classes": 5},
    },
    quick={
        **{"samples": 200, "picks": 20, "features": 16, "classes": 4},
        "gate": {"samples": 100, "picks": 30, "features": 8, "classes": 3},
    },
    brief={"samples": 4000, "picks": 400},
    repeats=3,
    points=_graph_cut_points,
    gate=_graph_cut_gate,
    check=_graph_cut_check,
    must_show=_graph_cut_must_show,
)
