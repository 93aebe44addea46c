"""Trajectory matching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    cosine,
    r_squared,
    relative_error,
    step_must_show,
)
from ..peers import compiled, eager, tesla
from ..peers.problem import Problem, Result, make_problem


def _truth(problem: Problem, mode: str) -> Result:
    """By definition: autograd through all steps; for the first-order estimator with each step's parameters constant."""
    return eager.prepare(problem, first_order=mode == "first_order")()


def _rounding_noise(problem: Problem, truth: Result, mode: str) -> float:
    """How far the truth itself moves when theta_0 moves by one rounding: an fp32 trajectory is chaotic."""
    sign = torch.sign(torch.randn(problem.theta0.shape, generator=torch.Generator().manual_seed(1)))
    nudged = problem.theta0 * (1 + torch.finfo(problem.theta0.dtype).eps * sign.to(problem.theta0.dtype))
    moved = _truth(replace(problem, theta0=nudged), mode)
    return max(relative_error(a, b) for a, b in zip(moved[1:], truth[1:], strict=True))


def _unroll_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small: minibatches (so that an image is in several steps), every gradient to 1e-10."""
    problem = make_problem(**config["gate"], dtype=torch.float64)
    entries = {name: entry for name, entry in case.providers.items() if entry.precision == "fp32"}
    truths = {entry.mode: _truth(problem, entry.mode) for entry in entries.values()}
    for name, entry in entries.items():
        for what, value, truth in zip(Result._fields, entry.prepare(problem)(), truths[entry.mode], strict=True):
            yield Check(name, f"float64 {what}, relative error", relative_error(value, truth), 1e-10)


def _bf16_check(name: str, case: Case, problem: Problem, output: Result, truth: Result) -> Iterator[Check]:
    """The image gradient after all steps and, for ours, the result of each step at the thetas of float32."""
    yield Check(name, "bf16 d_images, cosine to float32", cosine(output.d_images, truth.d_images), 0.95, at_least=True)
    if case.providers[name].prepare is ours.exact_bf16:
        for what, value in ours.lowest_step_cosines(problem).items():
            yield Check(name, f"bf16 {what} of a step, lowest cosine to float32", value, 0.99, at_least=True)


def _unroll_check(case: Case, point: Point, problem: Problem, outputs: dict[str, Result]) -> Iterator[Check]:
    """At the timed size and precision: 0.1 in L2 (a cosine of 0.995), or twice the measured rounding noise."""
    truths: dict[str, Result] = {case.providers[case.baseline].mode: outputs[case.baseline]}
    for name, output in outputs.items():
        if name == case.baseline:
            continue
        if case.providers[name].precision == "bf16":
            yield from _bf16_check(name, case, problem, output, outputs[case.baseline])
            continue
        mode = case.providers[name].mode
        if mode not in truths:
            truths[mode] = _truth(problem, mode)
        errors = {
            what: relative_error(value, truth)
            for what, value, truth in zip(Result._fields, output, truths[mode], strict=True)
        }
        bound = 0.1 if max(errors.values()) <= 0.1 else max(0.1, 2 * _rounding_noise(problem, truths[mode], mode))
        for what, error in errors.items():
            yield Check(name, f"{problem.images.dtype} {what}, relative error".replace("torch.", ""), error, bound)


_UNROLL_PROVIDERS: dict[str, Entry] = {
    "eager-plain": Entry(eager.prepare, "exact"),
    "eager-accelerated": Entry(ours.eager_accelerated, "exact"),
    "tesla": Entry(tesla.prepare, "first_order"),
    "compiled": Entry(compiled.prepare, "exact"),
    "compiled-nchw": Entry(partial(compiled.prepare, channels_last=False), "exact"),
    "compiled-bf16": Entry(partial(compiled.prepare, half=True), "exact", "bf16"),
    "exact": Entry(ours.exact, "exact"),
    "exact-bf16": Entry(ours.exact_bf16, "exact", "bf16"),
    "first_order": Entry(ours.first_order, "first_order"),
}


def _step_points(case: Case, config: Config) -> list[Point]:
    steps = config["steps"]
    return [Point(steps, lambda: make_problem(**config), tuple(case.providers), per=steps)]


def _step_case(name: str, shape: Config, brief: Config, providers: tuple[str, ...], bounds: dict) -> Case:
    return Case(
        name=name,
        metric="time per inner step",
        unit="s",
        x_name="steps",
        providers={provider: _UNROLL_PROVIDERS[provider] for provider in providers},
        full={**CONVNET, "gate": GATE, **shape},
        quick={
            **SMALL,
            "gate": GATE,
            **{name: shape[name] for name in ("augment", "gate") if name in shape},
            "steps": 3,
        },
        repeats=3,
        points=_step_points,
        gate=_unroll_gate,
        check=_unroll_check,
        must_show=partial(step_must_show, bounds),
        brief=brief,
        brief_providers=("eager-plain", "compiled", "exact", "exact-bf16"),
    )


UNROLL_STEP = _step_case(
    "unroll_step",
    {"steps": 10},
    {"steps": 2},
    tuple(name for name in _UNROLL_PROVIDERS if name != "compiled-nchw"),
    {
        ("exact", "eager-plain"): 4.0,
        ("exact", "compiled*"): 1.5,
        ("exact-bf16", "eager-plain"): 8.0,
        ("exact-bf16", "compiled*"): 3.0,
        ("exact-bf16", "compiled-bf16"): 1.3,
        ("eager-accelerated", "eager-plain"): 1.4,
    },
)


UNROLL_STEP_64 = _step_case(
    "unroll_step_64",
    {"steps": 10, "depth": 4, "image_size": 64, "images": 32, "batch": 32},
    {"steps": 2},
    ("eager-plain", "compiled", "exact"),
    {("exact", "eager-plain"): 4.0, ("exact", "compiled*"): 1.4},
)


# so small that calling operators takes longer than their work
UNROLL_STEP_SMALL = _step_case(
    "unroll_step_small",
    {"steps": 50, "width": 32, "images": 10, "batch": 10},
    {},
    ("eager-plain", "compiled", "compiled-nchw", "exact"),
    {("exact", "eager-plain"): 5.0, ("exact", "compiled*"): 1.5},
)


# a trajectory method's outer step as in its repository: ten images per class, augmented in every inner step
OUTER_STEP = _step_case(
    "outer_step",
    {"steps": 20, "augment": True, "gate": {**GATE, "augment": True}},
    {"steps": 2},
    ("eager-plain", "exact"),
    {("exact", "eager-plain"): 3.0},
)


# with the repository's own augmentation, a function of the images that draws from torch's generator
MTT_STEP = _step_case(
    "mtt_step",
    {"steps": 10, "lambdas": True, "gate": {**GATE, "lambdas": True}},
    {"steps": 2},
    ("eager-plain", "exact"),
    {("exact", "eager-plain"): 5.0},
)


def _kinds_points(case: Case, config: Config) -> list[Point]:
    steps, points = config["steps"], []
    for name, changes in config["kinds"].items():
        problem = partial(make_problem, **{**config, **changes})
        points.append(Point(name, problem, tuple(case.providers), per=steps))
    return points


def _kinds_gate(case: Case, config: Config) -> Iterator[Check]:
    """torch.compile is compared at the timed size only: compiling takes half a minute per network."""
    case = replace(case, providers={name: entry for name, entry in case.providers.items() if name != "compiled"})
    for name, changes in config["kinds"].items():
        kind = {"kind": changes["kind"]} if "kind" in changes else {}
        for check in _unroll_gate(case, {"gate": config["gate"] | kind}):
            yield replace(check, subject=f"{check.subject}, {name}")


def _kinds_must_show(bounds: dict[str, dict], medians: Medians, config: Config) -> Iterator[Check]:
    for name in config["kinds"]:
        own = {(mode, x, provider): value for (mode, x, provider), value in medians.items() if x == name}
        for check in step_must_show(bounds[name], own, config):
            yield replace(check, subject=f"{check.subject}, {name}")


def _kinds_case(name: str, kinds: dict[str, Config], bounds: dict[str, tuple[float, float]]) -> Case:
    return Case(
        name=name,
        metric="time per inner step",
        unit="s",
        x_name="network",
        providers={provider: _UNROLL_PROVIDERS[provider] for provider in ("eager-plain", "compiled", "exact")},
        full={**CONVNET, "gate": GATE, "steps": 10, "kinds": kinds},
        quick={**SMALL, "gate": GATE, "steps": 2}
        | {
            "kinds": {each: {"kind": changes["kind"]} for each, changes in kinds.items() if "kind" in changes}
            or {"": {}}
        },
        repeats=3,
        points=_kinds_points,
        gate=_kinds_gate,
        check=_unroll_check,
        must_show=partial(
            _kinds_must_show,
            {
                each: {("exact", "eager-plain"): eager_bound, ("exact", "compiled*"): compiled_bound}
                for each, (eager_bound, compiled_bound) in bounds.items()
            }
            | {"": {}},
        ),
        brief={"steps": 2},
    )


# the repositories' other ConvNets
UNROLL_STEP_NETWORKS = _kinds_case(
    "unroll_step_networks",
    {
        "leaky ReLU": {"kind": {"act": "leakyrelu"}},
        "max pooling": {"kind": {"pool": "max"}},
        "GroupNorm(4)": {"kind": {"norm": "group"}},
        "BatchNorm": {"kind": {"norm": "batch"}},
        "FRePo": {"kind": {"norm": "batch", "doubling": True}, "images": 50, "batch": 50},
    },
    {
        "leaky ReLU": (4.0, 2.0),
        "max pooling": (4.0, 2.0),
        "GroupNorm(4)": (4.0, 2.0),
        "BatchNorm": (2.5, 1.2),
        "FRePo": (2.5, 1.2),
    },
)

UNROLL_STEP_LARGE = _kinds_case(
    "unroll_step_large",
    {
        "D5, 128 pixels, B=10": {"depth": 5, "image_size": 128, "images": 10, "batch": 10},
        "D4, 64 pixels, 1,000 classes": {"depth": 4, "image_size": 64, "images": 1000, "classes": 1000},
    },
    {"D5, 128 pixels, B=10": (6.5, 3.0), "D4, 64 pixels, 1,000 classes": (6.5, 3.0)},
)


def _network_points(case: Case, config: Config) -> list[Point]:
    steps = config["steps"]
    return [
        Point(name, partial(_network, config, name), tuple(case.providers), per=steps) for name in config["networks"]
    ]


def _network(config: Config, name: str) -> Problem:
    return make_problem(**{**config, "network": name})


def _network_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for name in config["networks"]:
        values = {provider: value for (_, x, provider), value in medians.items() if x == name}
        for provider, bound in (("compiled-engine", 1.5), ("generic-half", 1.0), ("generic-eighth", 0.9)):
            if provider in values:
                speedup = values["eager-plain"] / values[provider]
                yield Check(provider, f"{name}, speed-up over eager-plain", speedup, bound, at_least=True)


_NETWORK_GATE = {"network": "tiny", "channels": 3, "classes": 4, "image_size": 8, "images": 6, "batch": 4, "steps": 4}

# the networks of the cross-architecture tables, which the student engine does not run
UNROLL_NETWORKS = Case(
    name="unroll_networks",
    metric="time per inner step",
    unit="s",
    x_name="network",
    providers={
        "eager-plain": Entry(eager.prepare, "exact"),
        "generic-half": Entry(partial(ours.exact_generic, share=0.5), "exact"),
        "generic-eighth": Entry(partial(ours.exact_generic, share=0.125), "exact"),
        "compiled-engine": Entry(ours.exact_compiled, "exact"),
    },
    full={"channels": 3, "classes": 10, "image_size": 32, "images": 50, "batch": 50, "steps": 10, "lr": 0.01}
    | {"networks": ("resnet18", "vgg11", "alexnet"), "gate": {**_NETWORK_GATE, "lr": 0.05}},
    quick={**_NETWORK_GATE, "networks": ("tiny",), "gate": {**_NETWORK_GATE, "lr": 0.05}},
    repeats=3,
    points=_network_points,
    gate=_unroll_gate,
    check=_unroll_check,
    must_show=_network_must_show,
    brief={"steps": 2, "networks": ("alexnet",)},
    brief_providers=("eager-plain", "generic-half", "compiled-engine"),
)


@dataclass(frozen=True)
class Scaled:
    """`Problem` for some students at once, all with its theta0, images and target."""

    problem: Problem
    students: int


def _scaling_points(case: Case, config: Config) -> list[Point]:
    base = {"T": config["steps"], "B": config["batch"], "E": 1}
    points = []
    for mode, values in config["values"].items():
        for x in values:
            size = {**base, mode: x}

            def build(size: dict[str, int] = size) -> Scaled:
                sizes = {**config, "steps": size["T"], "batch": size["B"], "images": size["B"]}
                return Scaled(make_problem(**sizes), size["E"])

            points.append(Point(x, build, tuple(case.providers), mode))
    return points


def _scaling_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, three students: the mean loss and gradients are those of one, since all are alike."""
    problem = make_problem(**config["gate"], dtype=torch.float64)
    for name, entry in case.providers.items():
        outputs = entry.prepare(Scaled(problem, 3))()
        for what, value, truth in zip(Result._fields, outputs, _truth(problem, "exact"), strict=True):
            yield Check(name, f"float64 {what}, relative error", relative_error(value, truth), 1e-10)


def _scaling_check(case: Case, point: Point, problem: Scaled, outputs: dict[str, Any]) -> Iterator[Check]:
    for name, output in outputs.items():
        finite = all(bool(torch.isfinite(t).all()) for t in output)
        yield Check(name, f"{point.mode}={point.x}, finite", float(finite), 1.0, at_least=True)


def _scaling_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for mode in config["values"]:
        line = {x: value for (m, x, _), value in medians.items() if m == mode}
        yield Check("exact", f"R^2 of a line in {mode}", r_squared(line), 0.99, at_least=True)


UNROLL_SCALING = Case(
    name="unroll_scaling",
    metric="time of one outer gradient",
    unit="s",
    x_name="size",
    providers={"exact": Entry(ours.exact_students, "exact")},
    full={**CONVNET, "steps": 5, "batch": 40, "gate": GATE}
    | {"values": {"T": (5, 10, 20, 40), "B": (20, 40, 80, 160), "E": (1, 2, 4, 8)}},
    quick={**SMALL, "steps": 2, "gate": GATE, "values": {"T": (2, 4, 6), "B": (4, 8, 12), "E": (1, 2, 3)}},
    repeats=5,
    points=_scaling_points,
    gate=_scaling_gate,
    check=_scaling_check,
    must_show=_scaling_must_show,
    lines=True,
)


def _memory_points(case: Case, config: Config) -> list[Point]:
    points = []
    for steps in config["steps"]:
        # the eager loop keeps every step: 50 steps of 100 images need 15 GiB
        fits = tuple(name for name in case.providers if name != "eager-plain" or steps <= config["eager_steps"])
        points.append(Point(steps, partial(_memory_problem, config, steps), fits))
    return points


def _memory_problem(config: Config, steps: int) -> Problem:
    return make_problem(**{**config, "steps": steps})


def _memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    exact = {x: value for (_, x, provider), value in medians.items() if provider == "exact"}
    if 10 in exact and 50 in exact:
        parameters = _memory_problem(config, 1).theta0.numel()
        # 40 more steps may store 40 more parameter vectors and a fifth for everything else
        bound = 1.2 * 40 * parameters * 4 / 2**20
        yield Check("exact", "MiB from T=10 to T=50", exact[50] - exact[10], bound)
    if 50 in exact and ("exact", 50, "eager-plain") in medians:
        ratio = medians["exact", 50, "eager-plain"] / exact[50]
        yield Check("exact", "eager-plain's peak over its own, T=50", ratio, 20.0, at_least=True)


UNROLL_MEMORY = Case(
    name="unroll_memory",
    metric="peak memory above the process's baseline",
    unit="MiB",
    x_name="steps",
    providers={name: _UNROLL_PROVIDERS[name] for name in ("eager-plain", "tesla", "exact")},
    full={**CONVNET, "steps": (1, 2, 5, 10, 20, 50), "eager_steps": 50, "check_steps": 2, "gate": GATE},
    # large enough for the system's resolution
    quick={**SMALL, "width": 32, "image_size": 32, "images": 16, "batch": 16, "steps": (1, 4), "eager_steps": 4}
    | {"check_steps": 2, "gate": GATE},
    repeats=1,
    points=_memory_points,
    gate=_unroll_gate,
    check=_unroll_check,
    must_show=_memory_must_show,
    problem=_memory_problem,
    brief={"steps": (1, 2, 5), "eager_steps": 5},
)


def _network_memory_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["steps"], partial(_network_memory_problem, config, config["steps"]), tuple(case.providers))]


def _network_memory_problem(config: Config, steps: int) -> Problem:
    return make_problem(**{**config, "steps": steps})


def _network_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    values = {provider: value for (_, _, provider), value in medians.items()}
    for provider, bound in (("compiled-engine", 8.0), ("generic-half", 2.0), ("generic-eighth", 8.0)):
        if provider in values and "eager-plain" in values:
            ratio = values["eager-plain"] / values[provider]
            yield Check(provider, "eager-plain's peak over its own", ratio, bound, at_least=True)


def _network_memory(network: str) -> Case:
    return replace(
        UNROLL_NETWORKS,
        name=f"unroll_{network}_memory",
        metric="peak memory above the process's baseline",
        unit="MiB",
        x_name="steps",
        full={**UNROLL_NETWORKS.full, "network": network, "check_steps": 2},
        quick={**UNROLL_NETWORKS.quick, "check_steps": 2},
        repeats=1,
        points=_network_memory_points,
        must_show=_network_memory_must_show,
        problem=_network_memory_problem,
        brief={},
    )


UNROLL_RESNET18_MEMORY = _network_memory("resnet18")
UNROLL_VGG11_MEMORY = _network_memory("vgg11")
UNROLL_ALEXNET_MEMORY = _network_memory("alexnet")


def _outer_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    values = {provider: value for (_, x, provider), value in medians.items() if x == max(config["steps"])}
    if len(values) == 2:
        ratio = values["eager-plain"] / values["exact"]
        yield Check("exact", "eager-plain's peak over its own", ratio, 15.0, at_least=True)


OUTER_STEP_MEMORY = replace(
    UNROLL_MEMORY,
    name="outer_step_memory",
    providers={name: _UNROLL_PROVIDERS[name] for name in ("eager-plain", "exact")},
    full={**UNROLL_MEMORY.full, "steps": (20,), "augment": True, "gate": {**GATE, "augment": True}},
    quick={**UNROLL_MEMORY.quick, "augment": True},
    must_show=_outer_memory_must_show,
    brief={},
)
