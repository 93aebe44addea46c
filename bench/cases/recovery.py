"""Recovering images from a frozen network: BatchNorm statistics, frozen convolutions, and the step of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import ours
from ..case import Case, Check, Config, Entry, Medians, Point, Provider, cosine, relative_error, step_must_show
from ..peers import recover, resnet


def _matched_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(layout, partial(recover.make_inputs, {**config, "layout": layout}), tuple(case.providers))
        for layout in config["layouts"]
    ]


_SMALL_NET: Config = {"batch": 3, "image_size": 64, "width": 4, "classes": 5, "layout": "channels_last"}


def _matched_errors(output: recover.Matched, truth: recover.Matched) -> dict[str, float]:
    worst = max(map(relative_error, output.gradients, truth.gradients))
    return {"loss": relative_error(output.loss, truth.loss), "worst input's gradient": worst}


def _matched_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small: the loss and every input's gradient to 1e-10."""
    problem = recover.make_inputs(_SMALL_NET, dtype=torch.float64)
    truth = recover.matching(problem)()
    for name, entry in case.providers.items():
        for what, error in _matched_errors(entry.prepare(problem)(), truth).items():
            yield Check(name, f"float64 {what}, relative error", error, 1e-10)


def _matched_check(case: Case, point: Point, problem: Any, outputs: dict[str, Any]) -> Iterator[Check]:
    for name, output in outputs.items():
        if name != case.baseline:
            for what, error in _matched_errors(output, outputs[case.baseline]).items():
                yield Check(name, f"float32 {what}, relative error", error, 1e-4)


def _matched_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    for layout in config["layouts"]:
        values = {provider: value for (_, x, provider), value in medians.items() if x == layout}
        if "pydistill" in values:
            speedup = values["hook"] / values["pydistill"]
            yield Check("pydistill", f"{layout}, speed-up over the hook", speedup, 3.0, at_least=True)


BN_STAT_MATCH = Case(
    name="bn_stat_match",
    metric="time, forward and backward of a network's inputs",
    unit="ms",
    x_name="layout",
    providers={
        "hook": Entry(recover.matching),
        "compiled": Entry(partial(recover.matching, op=recover.match_over_dimensions, compile=True)),
        "pydistill": Entry(partial(recover.matching, op=ours.bn_stat_match)),
    },
    full={"batch": 16, "image_size": 224, "width": 64, "layouts": ("nchw", "channels_last")},
    quick={"batch": 2, "image_size": 64, "width": 8, "layouts": ("nchw", "channels_last")},
    repeats=5,
    points=_matched_points,
    gate=_matched_gate,
    check=_matched_check,
    must_show=_matched_must_show,
    brief={"batch": 4},
    brief_providers=("hook", "pydistill"),
)


def _matched_memory_points(case: Case, config: Config) -> list[Point]:
    return [Point(rows, partial(recover.make_inputs, config, rows), tuple(case.providers)) for rows in config["rows"]]


def _gradient_mib(config: Config) -> float:
    inputs = recover.make_inputs(config, 1)
    return max(config["rows"]) * sum(t.numel() for t in inputs.x) * 4 / 2**20


def _matched_memory_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    """The gradients themselves, which every provider needs, and a twentieth."""
    value = medians.get(("", max(config["rows"]), "pydistill"))
    if value is not None:
        yield Check("pydistill", "peak over the gradients' own size", value / _gradient_mib(config), 1.05)


BN_STAT_MATCH_MEMORY = replace(
    BN_STAT_MATCH,
    name="bn_stat_match_memory",
    metric="peak memory above the process's baseline",
    unit="MiB",
    x_name="images",
    providers={name: BN_STAT_MATCH.providers[name] for name in ("hook", "pydistill")},
    full={"image_size": 224, "width": 64, "layout": "nchw", "rows": (4, 16), "check_steps": 2},
    quick={"image_size": 64, "width": 16, "layout": "nchw", "rows": (16,), "check_steps": 2},
    repeats=1,
    points=_matched_memory_points,
    must_show=_matched_memory_must_show,
    problem=recover.make_inputs,
)


def _recover_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["batch"], partial(recover.make_recovery, config), tuple(case.providers))]


def _recover_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small: loss, image gradient and the images after the step."""
    problem = recover.make_recovery(_SMALL_NET, dtype=torch.float64)
    truth = recover.repository(problem)()
    for name, entry in case.providers.items():
        if entry.precision == "fp32":
            for what, value, true in zip(recover.Recovered._fields, entry.prepare(problem)(), truth, strict=True):
                yield Check(name, f"float64 {what}, relative error", relative_error(value, true), 1e-10)


def _recover_check(case: Case, point: Point, problem: Any, outputs: dict[str, Any]) -> Iterator[Check]:
    truth = outputs[case.baseline]
    for name, output in outputs.items():
        if case.providers[name].precision == "bf16":
            similar = cosine(output.d_images, truth.d_images)
            yield Check(name, "bf16 d_images, cosine to float32", similar, 0.9, at_least=True)
        elif name != case.baseline:
            # if rounding decides a ReLU or a maximum, a gradient jumps: the repository's own step in another layout is
            # off by 0.003 from its float64; every digit counts in the gate, in float64
            for what, bound in (("loss", 1e-4), ("d_images", 0.05)):
                error = relative_error(getattr(output, what), getattr(truth, what))
                yield Check(name, f"float32 {what}, relative error", error, bound)


_RECOVER_BOUNDS = {
    ("pydistill", "repository"): 1.6,
    ("pydistill", "compiled*"): 1.15,
    # peers in float32 and in bfloat16, which is faster if the processor has it and otherwise takes half a minute
    ("pydistill-bf16", "repository"): 3.0,
    ("pydistill-bf16", "repository-bf16"): 3.0,
    ("pydistill-bf16", "compiled*"): 2.0,
    ("pydistill-bf16", "compiled-bf16"): 2.0,
}


SRE2L_RECOVER_STEP = Case(
    name="sre2l_recover_step",
    metric="time per step",
    unit="s",
    x_name="images",
    providers={
        "repository": Entry(recover.repository),
        "compiled": Entry(recover.compiled),
        "compiled-nchw": Entry(partial(recover.compiled, channels_last=False)),
        "pydistill": Entry(ours.recover_step),
        "repository-bf16": Entry(partial(recover.repository, half=True), precision="bf16"),
        "compiled-bf16": Entry(partial(recover.compiled, half=True), precision="bf16"),
        "pydistill-bf16": Entry(partial(ours.recover_step, half=True), precision="bf16"),
    },
    full={"batch": 16, "image_size": 224, "width": 64, "classes": 1000},
    quick=_SMALL_NET,
    repeats=5,
    points=_recover_points,
    gate=_recover_gate,
    check=_recover_check,
    must_show=partial(step_must_show, _RECOVER_BOUNDS),
    brief={"batch": 4},
    brief_providers=("repository", "pydistill"),
)


def _frozen_points(case: Case, config: Config) -> list[Point]:
    """Named by the layer's channels and side; the stem has three channels, and "/2" is a stride of two."""
    return [
        Point(
            f"{before}x{size}" + ("/2" if taps == 3 and stride == 2 else ""),
            partial(resnet.make_layer, config["batch"], before, width, size, taps, stride),
            tuple(case.providers),
        )
        for before, width, size, taps, stride in config["layers"]
    ]


def _frozen_gate(make: Callable[..., Any], truth: Provider, case: Case, config: Config) -> Iterator[Check]:
    """Float64, odd sizes: both outputs to 1e-10."""
    for sizes in config["gate"]:
        problem = make(*sizes, dtype=torch.float64)
        truths = truth(problem)()
        for name, entry in case.providers.items():
            for i, (value, expected) in enumerate(zip(entry.prepare(problem)(), truths, strict=True)):
                yield Check(name, f"float64 output {i}, relative error", relative_error(value, expected), 1e-10)


def _frozen_check(case: Case, point: Point, problem: resnet.Layer, outputs: dict[str, Any]) -> Iterator[Check]:
    """Against float64: four times the float32 error of torch's eager convolution, seven for the gradient of 3x3 taps
    with stride 2, whose direct sums are short. Some of torch's own in other layouts, which passed the float64 gate, are
    further off than that."""
    short = problem.weight.shape[2] == 3 and problem.stride == 2
    for i, truth in enumerate(resnet.layer_in_torch(problem.to(torch.float64))()):
        bound = (7 if short and i == 1 else 4) * relative_error(outputs[case.baseline][i], truth)
        if "pydistill" in outputs:
            error = relative_error(outputs["pydistill"][i], truth)
            yield Check("pydistill", f"{point.x}, output {i}, relative error", error, bound)


def _frozen_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    """Summed over the layers, each as often as the network has it."""
    totals: dict[str, float] = {}
    for (_, x, provider), value in medians.items():
        totals[provider] = totals.get(provider, 0.0) + value * config["times"].get(x, 1)
    for peer, bound in (("eager", 1.8), ("channels-last", 1.8), ("compiled", 1.8)):
        if peer in totals and "pydistill" in totals:
            speedup = totals[peer] / totals["pydistill"]
            yield Check("pydistill", f"all layers, speed-up over {peer}", speedup, bound, at_least=True)


FROZEN_CONV2D = Case(
    name="frozen_conv2d",
    metric="time of forward and input gradient",
    unit="ms",
    x_name="layer",
    providers={
        "eager": Entry(resnet.layer_in_torch),
        "channels-last": Entry(partial(resnet.layer_in_torch, channels_last=True)),
        "compiled": Entry(partial(resnet.layer_in_torch, channels_last=True, compiled=True)),
        "pydistill": Entry(ours.frozen_layer),
    },
    full={
        "batch": 16,
        "layers": (
            (3, 64, 224, 7, 2),
            (64, 64, 56, 3, 1),
            (64, 128, 56, 3, 2),
            (128, 128, 28, 3, 1),
            (128, 256, 28, 3, 2),
            (256, 256, 14, 3, 1),
            (512, 512, 7, 3, 1),
        ),
        "times": {"64x56": 4, "128x28": 3, "256x14": 3, "512x7": 3},
        "gate": ((2, 5, 19, 9, 3, 1), (2, 5, 19, 9, 3, 2), (2, 3, 18, 15, 7, 2)),
    },
    quick={
        "batch": 2,
        "layers": ((3, 16, 20, 7, 2), (16, 16, 9, 3, 1), (32, 36, 11, 3, 2)),
        "gate": ((1, 3, 5, 6, 3, 1),),
        "times": {},
    },
    repeats=5,
    points=_frozen_points,
    gate=partial(_frozen_gate, resnet.make_layer, resnet.layer_in_torch),
    check=_frozen_check,
    must_show=_frozen_must_show,
)


def _network_points(case: Case, config: Config) -> list[Point]:
    return [Point(config["size"], lambda: resnet.make_recovered(*_network_sizes(config)), tuple(case.providers))]


def _network_sizes(config: Config) -> tuple[int, ...]:
    return config["batch"], config["size"], config["width"], config["classes"]


def _network_check(case: Case, point: Point, problem: resnet.Recovered, outputs: dict[str, Any]) -> Iterator[Check]:
    """Logits to rounding. In the gradient, a few activations within rounding of zero fall on the ReLU's other side."""
    truths = outputs[case.baseline]
    for name, values in outputs.items():
        yield Check(name, "logits, relative error", relative_error(values[0], truths[0]), 1e-4)
        yield Check(name, "image gradient, cosine", cosine(values[1], truths[1]), 0.999, at_least=True)


def _network_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    values = {provider: value for (_, _, provider), value in medians.items()}
    best = [value for name, value in values.items() if name.startswith("compiled")]
    peers = {"eager": (values.get("eager"), 1.6), "the best compiled": (min(best, default=None), 1.15)}
    for peer, (value, bound) in peers.items():
        if value is not None and "pydistill" in values:
            speedup = value / values["pydistill"]
            yield Check("pydistill", f"speed-up over {peer}", speedup, bound, at_least=True)


FROZEN_RESNET18 = Case(
    name="frozen_resnet18",
    metric="time of forward and image gradient",
    unit="s",
    x_name="image size",
    providers={
        "eager": Entry(resnet.network_in_torch),
        "channels-last": Entry(partial(resnet.network_in_torch, channels_last=True)),
        "compiled": Entry(partial(resnet.network_in_torch, channels_last=True, compiled=True)),
        "compiled-nchw": Entry(partial(resnet.network_in_torch, compiled=True)),
        "pydistill": Entry(ours.frozen_network),
    },
    full={"batch": 16, "size": 224, "width": 64, "classes": 1000, "gate": ((2, 45, 32, 10),)},
    quick={"batch": 2, "size": 40, "width": 32, "classes": 10, "gate": ((1, 33, 32, 10),)},
    repeats=5,
    points=_network_points,
    gate=partial(_frozen_gate, resnet.make_recovered, resnet.network_in_torch),
    check=_network_check,
    must_show=_network_must_show,
)
