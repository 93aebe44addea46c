"""Matching losses: of gradients, distributions, attention, and by kernel ridge regression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    cosine,
    gate_float64,
    relative_error,
    step_must_show,
)
from ..peers import attention_maps, distribution, gradient_matching, kernel_ridge


def _gradient_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["ipc"], partial(gradient_matching.make_matching, config), tuple(case.providers))]


def _gradient_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small: to 1e-10."""
    problem = gradient_matching.make_matching(config["gate"]).double()
    truths = gradient_matching.prepare_eager(problem)()
    yield from gate_float64(case, problem, truths)


def _gradient_check(
    case: Case, point: Point, problem: gradient_matching.Matching, outputs: dict[str, gradient_matching.Matched]
) -> Iterator[Check]:
    """At the timed size and precision: 5e-3, or twice the baseline's own distance from float64."""
    truths = gradient_matching.prepare_eager(problem.double())()
    for i, (what, truth) in enumerate(zip(gradient_matching.Matched._fields, truths, strict=True)):
        bound = max(5e-3, 2 * relative_error(outputs[case.baseline][i], truth))
        for name, output in outputs.items():
            if case.providers[name].precision == "fp32":
                yield Check(name, f"float32 {what}, relative error", relative_error(output[i], truth), bound)
            elif what == "d_images":
                similarity = cosine(output[i], truth)
                yield Check(name, "bf16 d_images, cosine to float64", similarity, 0.95, at_least=True)
            else:
                yield Check(name, "bf16 loss, relative error", relative_error(output[i], truth), 0.05)


GRADIENT_MATCHING_STEP = Case(
    name="gradient_matching_step",
    metric="time of an outer step",
    unit="s",
    x_name="images per class",
    providers={
        "eager": Entry(gradient_matching.prepare_eager),
        "compiled": Entry(gradient_matching.prepare_compiled),
        "compiled-vmap": Entry(gradient_matching.prepare_vmapped),
        "pydistill": Entry(ours.gradient_matching_step),
        "pydistill-bf16": Entry(ours.gradient_matching_step_bf16, precision="bf16"),
    },
    full={**CONVNET, "ipc": 10, "batch_real": 256, "gate": {**GATE, "ipc": 2, "batch_real": 5}},
    quick={**SMALL, "ipc": 2, "batch_real": 5, "gate": {**GATE, "ipc": 2, "batch_real": 5}},
    repeats=3,
    points=_gradient_points,
    gate=_gradient_gate,
    check=_gradient_check,
    must_show=partial(step_must_show, {("pydistill", "eager"): 3.5, ("pydistill", "compiled*"): 1.3}),
    brief={"batch_real": 64},
    brief_providers=("eager", "compiled", "pydistill"),
)


def _distribution_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["real"], partial(distribution.make_images, config), tuple(case.providers))]


def _distribution_gate(maps: bool, case: Case, config: Config) -> Iterator[Check]:
    """Float64, small, an odd size: the loss and the images' gradient to 1e-10."""
    problem = distribution.make_images({**config, **config["gate"]}, torch.float64)
    truth = distribution.truth(problem, maps=maps)
    yield from gate_float64(case, problem, truth)


def _distribution_check(
    maps: bool, case: Case, point: Point, problem: distribution.Images, outputs: dict[str, distribution.Matched]
) -> Iterator[Check]:
    """At the timed size, against float64: 1e-2, or twice the baseline's own error; bf16: a cosine of 0.99.

    The floor is due to activations within rounding of zero that fall on the ReLU's other side, different ones in every
    order of summation: two ways of compiling plain torch differ by 6e-4.
    """
    truth = distribution.truth(problem, maps=maps)
    for name, output in outputs.items():
        if case.providers[name].precision == "bf16":
            similarity = cosine(output.d_images, truth.d_images)
            yield Check(name, "bf16 d_images, cosine to float64", similarity, 0.99, at_least=True)
            yield Check(name, "bf16 loss, relative error", relative_error(output.loss, truth.loss), 0.05)
            continue
        for i, (what, true) in enumerate(zip(distribution.Matched._fields, truth, strict=True)):
            bound = max(1e-2, 2 * relative_error(outputs[case.baseline][i], true))
            yield Check(name, f"float32 {what}, relative error", relative_error(output[i], true), bound)


def _distribution_case(name: str, maps: bool, providers: dict[str, Entry], bounds: dict, **options: Any) -> Case:
    compiled = partial(distribution.compiled_matching, maps=maps)
    gate = {"channels": 3, "classes": 3, "width": 8, "depth": 3, "image_size": 18, "real": 5, "synthetic": 2}
    return Case(
        name=name,
        metric="time of one outer gradient",
        unit="s",
        x_name="real images a class",
        providers={
            "eager": Entry(distribution.eager_datadam if maps else distribution.eager_dm),
            "compiled": Entry(compiled),
            "compiled-group-norm": Entry(partial(compiled, written_out=False)),
        }
        | providers,
        full={"channels": 3, "classes": 10, "width": 128, "depth": 3, "image_size": 32, "real": 128, "synthetic": 10}
        | {"power": 4.0, "gate": gate},
        quick={**gate, "depth": 2, "power": 4.0, "gate": gate},
        repeats=3,
        points=_distribution_points,
        gate=partial(_distribution_gate, maps),
        check=partial(_distribution_check, maps),
        must_show=partial(step_must_show, bounds),
        brief_providers=("eager", "compiled", "pydistill"),
        **options,
    )


DATADAM_STEP = _distribution_case(
    "datadam_step",
    True,
    {
        # on hardware without bf16, torch's bf16 convolutions take some thirty times as long as float32 ones
        "compiled-bf16": Entry(partial(distribution.compiled_matching, maps=True, half=True), precision="bf16"),
        "pydistill": Entry(ours.datadam),
        "pydistill-bf16": Entry(partial(ours.datadam, precision="bf16"), precision="bf16"),
    },
    {
        ("pydistill", "eager"): 6.0,
        ("pydistill", "compiled*"): 1.5,
        ("pydistill-bf16", "eager"): 10.0,
        ("pydistill-bf16", "compiled*"): 2.4,
        ("pydistill-bf16", "compiled-bf16"): 1.2,
    },
)


_PUBLISHED = {"kind": {"norm": "batch"}, "power": 1.0, "real": 64}

# as its repository runs it; the paper has instance norm and the fourth power
DATADAM_STEP_PUBLISHED = _distribution_case(
    "datadam_step_published",
    True,
    {"pydistill": Entry(ours.datadam)},
    {("pydistill", "eager"): 4.0, ("pydistill", "compiled*"): 1.5},
)
DATADAM_STEP_PUBLISHED = replace(
    DATADAM_STEP_PUBLISHED,
    full=DATADAM_STEP_PUBLISHED.full | _PUBLISHED,
    quick=DATADAM_STEP_PUBLISHED.quick | _PUBLISHED | {"real": 5},
)


DM_STEP = _distribution_case(
    "dm_step",
    False,
    {"pydistill": Entry(ours.dm)},
    {("pydistill", "eager"): 4.0, ("pydistill", "compiled*"): 1.2},
)


def _mmd_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["rows"], partial(distribution.make_rows, config), tuple(case.providers))]


def _mmd_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, few rows: the loss and both gradients to 1e-10."""
    problem = distribution.make_rows({"rows": 7, "features": 5}, dtype=torch.float64)
    truth = distribution.autograd_mmd(problem, distribution.cube)()
    yield from gate_float64(case, problem, truth)


def _mmd_check(
    case: Case,
    point: Point,
    problem: distribution.Rows,
    outputs: dict[str, distribution.Discrepancy],
) -> Iterator[Check]:
    """At the timed size and precision: 1e-4, or twice the baseline's own distance from float64.

    The loss is a small difference of means of kernels, whose rounding is the floor. The truth's distances are sums of
    squares, like the cube's, but without the cube, which would take 16 GiB in float64.
    """
    exact = partial(distribution.by_cdist, by_product=False)
    truth = distribution.autograd_mmd(problem.double(), exact)()
    yield from check_float32(case, outputs, truth, 1e-4)


MMD = Case(
    name="mmd",
    metric="time, forward and backward",
    unit="ms",
    x_name="rows of each sample",
    providers={
        "cube": Entry(partial(distribution.autograd_mmd, op=distribution.cube)),
        "cdist": Entry(partial(distribution.autograd_mmd, op=distribution.by_cdist)),
        "compiled": Entry(partial(distribution.autograd_mmd, op=distribution.cube, compiled=True)),
        "compiled-cdist": Entry(partial(distribution.autograd_mmd, op=distribution.by_cdist, compiled=True)),
        "pydistill": Entry(partial(distribution.autograd_mmd, op=ours.mmd)),
    },
    full={"rows": 256, "features": 2048},
    quick={"rows": 12, "features": 16},
    repeats=5,
    points=_mmd_points,
    gate=_mmd_gate,
    check=_mmd_check,
    must_show=partial(step_must_show, {("pydistill", "cube"): 3.0, ("pydistill", "compiled*"): 1.3}),
    brief_providers=("cube", "cdist", "pydistill"),
)


def _mmd_memory_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(rows, partial(distribution.make_rows, config, rows), tuple(case.providers)) for rows in config["rows"]
    ]


def _mmd_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    values = {provider: value for (_, x, provider), value in medians.items() if x == max(config["rows"])}
    if "pydistill" in values:
        ratio = values["cube"] / values["pydistill"]
        yield Check("pydistill", "the cube's peak over its own", ratio, 50.0, at_least=True)


MMD_MEMORY = replace(
    MMD,
    name="mmd_memory",
    metric="peak memory above the process's baseline",
    unit="MiB",
    providers={name: MMD.providers[name] for name in ("cube", "cdist", "pydistill")},
    full={"rows": (256,), "features": 2048, "check_steps": 16},
    # large enough for the system's resolution
    quick={"rows": (64,), "features": 512, "check_steps": 16},
    repeats=1,
    points=_mmd_memory_points,
    must_show=_mmd_memory_must_show,
    problem=distribution.make_rows,
)


def _divergence_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(shape[2], partial(_divergence_problem, config, shape[2]), tuple(case.providers))
        for shape in config["shapes"]
    ]


def _divergence_problem(config: Config, tokens: int) -> attention_maps.Maps:
    shape = next((shape for shape in config["shapes"] if shape[2] == tokens), config["gate"])
    return attention_maps.make_maps(shape, config["shapes"])


def _divergence_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, an odd size, loss and gradients to 1e-10."""
    problem = attention_maps.make_maps(config["gate"], dtype=torch.float64)
    truths = attention_maps.prepare(problem)()
    yield from gate_float64(case, problem, truths)


def _divergence_check(
    case: Case, point: Point, problem: attention_maps.Maps, outputs: dict[str, Any]
) -> Iterator[Check]:
    """Against plain torch in float64: 1e-5, or twice plain torch's own fp32 error."""
    truths = attention_maps.prepare(problem.double())()
    yield from check_float32(case, outputs, truths, 1e-5, f"{point.x} tokens, ")


def _divergence_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for _, _, tokens, _ in config["shapes"]:
        found = {provider: value for (_, x, provider), value in medians.items() if x == tokens}
        compiled = [value for name, value in found.items() if name.startswith("compiled")]
        peers = {"eager": ([found["eager"]], 2.0), "the best compiled": (compiled, 1.3)}
        for peer, (values, bound) in peers.items():
            if values and "pydistill" in found:
                speedup = min(values) / found["pydistill"]
                yield Check("pydistill", f"{tokens} tokens, speed-up over {peer}", speedup, bound, at_least=True)


ATTENTION_MAP_DIVERGENCE = Case(
    name="attention_map_divergence",
    metric="time of loss and gradients",
    unit="ms",
    x_name="tokens",
    providers={
        "eager": Entry(attention_maps.prepare),
        "eager-once": Entry(partial(attention_maps.prepare, divergence=attention_maps.once)),
        "compiled": Entry(attention_maps.prepare_compiled),
        "compiled-once": Entry(partial(attention_maps.prepare_compiled, divergence=attention_maps.once)),
        "pydistill": Entry(partial(attention_maps.prepare, divergence=ours.attention_map_divergence)),
    },
    full={"shapes": ((8, 12, 197, 64), (1, 12, 1025, 64)), "gate": (2, 3, 37, 20)},
    quick={"shapes": ((1, 2, 17, 8),), "gate": (2, 3, 7, 5)},
    repeats=15,
    points=_divergence_points,
    gate=_divergence_gate,
    check=_divergence_check,
    must_show=_divergence_must_show,
)


def _divergence_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for (_, _, tokens, _), bound in zip(config["shapes"], (5.0, 15.0), strict=True):
        ratio = medians["", tokens, "eager"] / medians["", tokens, "pydistill"]
        yield Check("pydistill", f"{tokens} tokens, eager's peak over its own", ratio, bound, at_least=True)


ATTENTION_MAP_DIVERGENCE_MEMORY = replace(
    ATTENTION_MAP_DIVERGENCE,
    name="attention_map_divergence_memory",
    metric="peak memory above the process's baseline",
    unit="MiB",
    # the memory taken by compilation is not of interest here
    providers={name: ATTENTION_MAP_DIVERGENCE.providers[name] for name in ("eager", "eager-once", "pydistill")},
    full={**ATTENTION_MAP_DIVERGENCE.full, "check_steps": 37},
    # large enough for the system's resolution
    quick={"shapes": ((1, 4, 400, 32),), "gate": (2, 3, 7, 5), "check_steps": 7},
    repeats=3,
    must_show=_divergence_memory_must_show,
    problem=_divergence_problem,
)


def _krr_points(case: Case, config: Config) -> list[Point]:
    rows = config["synthetic"]
    return [Point(rows, partial(kernel_ridge.make_features, config), tuple(case.providers))]


def _krr_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, few rows: the loss and both gradients to 1e-8, the accuracy left by a condition of 1e6."""
    problem = kernel_ridge.make_features(config["gate"], dtype=torch.float64)
    truth = kernel_ridge.prepare(problem)()
    yield from gate_float64(case, problem, truth, bound=1e-8)


def _krr_check(
    case: Case, point: Point, problem: kernel_ridge.Features, outputs: dict[str, kernel_ridge.Ridge]
) -> Iterator[Check]:
    """At the timed size and precision: 1e-5, or twice the baseline's own distance from float64."""
    truth = kernel_ridge.prepare(problem.double())()
    yield from check_float32(case, outputs, truth, 1e-5)


def _krr_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    found = {provider: value for (_, _, provider), value in medians.items()}
    if {"solve", "pydistill"} <= found.keys():
        ratio = found["solve"] / found["pydistill"]
        yield Check("pydistill", "solve's peak over its own", ratio, 1.5, at_least=True)


KRR_LOSS = Case(
    name="krr_loss",
    metric="time, forward and backward",
    unit="ms",
    x_name="synthetic images",
    providers={
        "solve": Entry(kernel_ridge.prepare),
        "cholesky": Entry(partial(kernel_ridge.prepare, op=kernel_ridge.by_cholesky)),
        "pydistill": Entry(partial(kernel_ridge.prepare, op=ours.krr_loss)),
    },
    # 8,193 features with the column of ones
    full={"real": 1024, "synthetic": 1000, "features": 8192, "targets": 512}
    | {"gate": {"real": 13, "synthetic": 7, "features": 30, "targets": 5}},
    quick={"real": 40, "synthetic": 20, "features": 60, "targets": 10}
    | {"gate": {"real": 13, "synthetic": 7, "features": 30, "targets": 5}},
    repeats=7,
    points=_krr_points,
    gate=_krr_gate,
    check=_krr_check,
    must_show=partial(step_must_show, {("pydistill", "solve"): 1.5}),
)


KRR_LOSS_MEMORY = replace(
    KRR_LOSS,
    name="krr_loss_memory",
    metric="peak memory above the process's baseline",
    unit="MiB",
    full={**KRR_LOSS.full, "check_steps": 50},
    # large enough for the system's resolution
    quick={**KRR_LOSS.quick, "real": 256, "synthetic": 256, "features": 4096, "check_steps": 20},
    repeats=1,
    must_show=_krr_memory_must_show,
    problem=kernel_ridge.make_features,
)
