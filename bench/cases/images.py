"""The ConvNet's block and the augmentations: operators on images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .. import ours
from ..case import Case, Check, Config, Entry, Medians, Point, check_float32, gate_float64
from ..peers import augment, block, multi_crop


def _block_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(layout, partial(block.make_block, config["shape"], layout, mode), tuple(case.providers), mode)
        for mode in block.MODES
        for layout in block.LAYOUTS
    ]


def _block_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, an odd size, both layouts, every output of every mode to 1e-10."""
    for mode in block.MODES:
        for layout in block.LAYOUTS:
            problem = block.make_block(config["gate"], layout, mode, torch.float64)
            truths = block.eager_block(problem)()
            yield from gate_float64(case, problem, truths, f"{mode}, {layout}, ")


def _block_check(case: Case, point: Point, problem: block.Block, outputs: dict[str, Any]) -> Iterator[Check]:
    """Against plain torch in float64: at most twice plain torch's own fp32 error.

    The floor of 1e-3 is due to a dozen activations of 13 million that are within rounding of zero and fall on the
    ReLU's other side: an error of order one each, different in every correct implementation.
    """
    truths = block.eager_block(problem.double())()
    yield from check_float32(case, outputs, truths, 1e-3, f"{point.mode}, {point.x}, ")


INSTANCE_NORM_RELU_AVG_POOL = Case(
    name="instance_norm_relu_avg_pool",
    metric="time",
    unit="ms",
    x_name="layout",
    providers={
        "eager": Entry(block.eager_block),
        "compiled": Entry(block.compiled_block),
        "pydistill": Entry(partial(block.eager_block, op=ours.instance_norm_relu_avg_pool)),
    },
    full={"shape": (100, 128, 32, 32), "gate": (3, 5, 9, 7)},
    quick={"shape": (4, 8, 8, 8), "gate": (3, 5, 9, 7)},
    repeats=10,
    points=_block_points,
    gate=_block_gate,
    check=_block_check,
)


def _augment_points(case: Case, config: Config) -> list[Point]:
    size = config["shape"][-1]
    return [
        Point(size, partial(augment.make_augmentation, config["shape"], mode), tuple(case.providers), mode)
        for mode in augment.MODES
    ]


def _augment_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, an odd size, both outputs to 1e-10."""
    problem = augment.make_augmentation(config["gate"], augment.MODES[1], torch.float64)
    truths = augment.eager_augment(problem)()
    yield from gate_float64(case, problem, truths)


def _augment_check(case: Case, point: Point, problem: augment.Augmentation, outputs: dict[str, Any]) -> Iterator[Check]:
    """Against plain torch in float64: 1e-5, or twice plain torch's own fp32 error."""
    truths = augment.eager_augment(problem.double())()
    yield from check_float32(case, outputs, truths, 1e-5, f"{point.mode}, ")


def _augment_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    found = {provider: value for (mode, _, provider), value in medians.items() if mode == augment.MODES[1]}
    for peer, bound in (("eager", 4.0), ("eager-batched", 4.0), ("compiled", 4.0)):
        if peer in found and "pydistill" in found:
            speedup = found[peer] / found["pydistill"]
            yield Check("pydistill", f"forward+backward, speed-up over {peer}", speedup, bound, at_least=True)


AUGMENT = Case(
    name="augment",
    metric="time",
    unit="ms",
    x_name="image size",
    providers={
        "eager": Entry(partial(augment.eager_augment, op=partial(augment.sequence, by_image=True))),
        "eager-batched": Entry(augment.eager_augment),
        "compiled": Entry(augment.compiled_augment),
        "pydistill": Entry(partial(augment.eager_augment, op=ours.augment_images)),
    },
    full={"shape": (256, 3, 32, 32), "gate": (5, 3, 17, 15)},
    quick={"shape": (4, 3, 8, 8), "gate": (3, 3, 9, 7)},
    repeats=20,
    points=_augment_points,
    gate=_augment_gate,
    check=_augment_check,
    must_show=_augment_must_show,
)


def _multi_crop_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(
            crops,
            partial(multi_crop.make_crops, config["shape"], config["size"], crops, mode),
            tuple(case.providers),
            mode,
        )
        for mode in multi_crop.MODES
        for crops in multi_crop.CROPS
    ]


def _multi_crop_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, sides that shrink and grow, both kinds of crops, both outputs to 1e-10."""
    for crops in multi_crop.CROPS:
        problem = multi_crop.make_crops(*config["gate"], crops, multi_crop.MODES[1], torch.float64)
        truths = multi_crop.crops_of(problem)()
        yield from gate_float64(case, problem, truths, f"{crops}, ")


def _multi_crop_check(case: Case, point: Point, problem: multi_crop.Crops, outputs: dict[str, Any]) -> Iterator[Check]:
    """Against plain torch in float64: 1e-5, or twice plain torch's own fp32 error."""
    truths = multi_crop.crops_of(problem.double())()
    yield from check_float32(case, outputs, truths, 1e-5, f"{point.mode}, {point.x}, ")


def _multi_crop_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    both = multi_crop.MODES[1]
    for crops in multi_crop.CROPS:
        found = {provider: value for (mode, x, provider), value in medians.items() if (mode, x) == (both, crops)}
        for peer in ("eager", "products", "compiled"):
            if peer in found and "pydistill" in found:
                speedup = found[peer] / found["pydistill"]
                yield Check("pydistill", f"{both}, {crops}, speed-up over {peer}", speedup, 3.0, at_least=True)


MULTI_CROP = Case(
    name="multi_crop",
    metric="time",
    unit="ms",
    x_name="crops",
    providers={
        "eager": Entry(multi_crop.crops_of),
        "products": Entry(partial(multi_crop.crops_of, op=multi_crop.products)),
        "compiled": Entry(partial(multi_crop.crops_of, op=multi_crop.compiled_products)),
        "pydistill": Entry(partial(multi_crop.crops_of, op=ours.crops)),
    },
    full={"shape": (64, 3, 224, 224), "size": 224, "gate": ((5, 3, 37, 35), 20)},
    quick={"shape": (4, 3, 16, 16), "size": 12, "gate": ((3, 3, 19, 17), 12)},
    repeats=5,
    points=_multi_crop_points,
    gate=_multi_crop_gate,
    check=_multi_crop_check,
    must_show=_multi_crop_must_show,
)
