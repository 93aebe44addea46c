"""The cases that only a GPU has: the block's four forms, and a student's steps.

gpu_block   the block's four forms against eager torch and torch.compile, and a copy that moves as many bytes
gpu_step    a student's gradient, and its forward-over-reverse tangent, per call and for E students
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from ..block_forms import FORMS, minimum_bytes
from ..case import CONVNET, GATE, SMALL, Case, Check, Config, Entry, Point, relative_error
from ..peers import block, compiled, eager
from ..peers.plain_convnet import PlainConvNet
from ..peers.problem import make_problem

Tensors = tuple[Tensor, ...]
CALLS = 10  # between two clock readings: one of the block's forms takes less than a tenth of a millisecond
SCALARS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


def device_seconds(thunk: Callable[[], Any], calls: int = CALLS) -> float:
    """One call's time on the device's own clock, including waits for launches: the mean of ``calls``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        thunk()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@dataclass(frozen=True)
class Forms:
    """Inputs of one of the block's forms."""

    form: str
    scalar: str
    arguments: Tensors

    def double(self) -> Forms:
        return replace(self, arguments=tuple(t.double() for t in self.arguments))


def make_forms(shape: tuple[int, ...], layout: str, form: str, scalar: str, device: str) -> Forms:
    made = block.make_block(shape, layout, "", torch.float64 if scalar == "f64" else torch.float32)
    primal, direction = (made.x, made.weight, made.bias), made.cotangents
    arguments = {
        "forward": primal,
        "backward": (made.grad_y, *primal),
        "jvp": (*primal, *direction),
        "backward_jvp": (made.grad_y, made.grad_y.flip(0), *primal, *direction),
    }[form]
    return Forms(form, scalar, tuple(t.to(device, SCALARS[scalar]) for t in arguments))


def _written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The block in elementary operations: torch's forward-mode formula for its norm does not take channels-last."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = compiled.instance_norm(x.to(wide), weight.to(wide), bias.to(wide))
    return F.avg_pool2d(F.relu(y).to(x.dtype), 2)


def _forms_of(op: block.BlockOp) -> dict[str, Callable[..., Tensors]]:
    """The four forms by torch.func."""

    def backward(grad_y: Tensor, *primal: Tensor) -> Tensors:
        return vjp(op, *primal)[1](grad_y)

    def backward_jvp(grad_y: Tensor, grad_y_t: Tensor, *tensors: Tensor) -> Tensors:
        def both(grad_y: Tensor, *primal: Tensor) -> Tensors:
            y, pull = vjp(op, *primal)
            return y, *pull(grad_y)

        return jvp(both, (grad_y, *tensors[:3]), (grad_y_t, *tensors[3:]))[1]

    return {
        "forward": lambda *primal: (op(*primal),),
        "backward": backward,
        "jvp": lambda *tensors: (jvp(op, tensors[:3], tensors[3:])[1],),
        "backward_jvp": backward_jvp,
    }


def block_eager(problem: Forms) -> Callable[[], Tensors]:
    form = _forms_of(_written_out if "jvp" in problem.form else block.plain)[problem.form]
    return torch.no_grad()(lambda: form(*problem.arguments))


def block_compiled(problem: Forms) -> Callable[[], Tensors]:
    torch.compiler.reset()  # as in `step_compiled`
    form = torch.compile(_forms_of(_written_out)[problem.form], fullgraph=True, dynamic=False)
    return torch.no_grad()(lambda: form(*problem.arguments))


def block_ours(problem: Forms) -> Callable[[], Tensors]:
    import pydistill  # noqa: F401  (registers the operators)

    name = "instance_norm_relu_avg_pool" + ("" if problem.form == "forward" else f"_{problem.form}")
    operator = getattr(torch.ops.pydistill, name)
    compute = torch.promote_types(SCALARS[problem.scalar], torch.float32)
    arguments = tuple(t.to(compute) if t.dim() == 1 else t for t in problem.arguments)

    def call() -> Tensors:
        out = operator(*arguments, 1e-5, True, True)
        return out if isinstance(out, tuple) else (out,)

    return torch.no_grad()(call)


def block_copy(problem: Forms) -> Callable[[], Tensors]:
    """A yardstick, not a solution: reads half of the form's least bytes and writes half."""
    x = max(problem.arguments, key=torch.numel)
    half = minimum_bytes(problem.form, problem.scalar, tuple(x.shape)) // 2
    source = torch.zeros(half, dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)

    def call() -> Tensors:
        target.copy_(source)
        return ()

    return call


def _block_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(
            layout,
            partial(make_forms, config["shape"], layout, form, scalar, config["device"]),
            tuple(case.providers),
            f"{form} {scalar}",
        )
        for form in FORMS
        for scalar in config["scalars"]
        for layout in block.LAYOUTS
    ]


def _block_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, an odd size, both layouts, every output of every form to 1e-10."""
    for form in FORMS:
        for layout in block.LAYOUTS:
            problem = make_forms(config["gate"], layout, form, "f64", config["device"])
            truths = block_eager(problem)()
            for name, entry in case.providers.items():
                for i, (value, truth) in enumerate(zip(entry.prepare(problem)(), truths, strict=name != "copy")):
                    yield Check(
                        name,
                        f"float64 {form}, {layout}, output {i}, relative error",
                        relative_error(value, truth),
                        1e-10,
                    )


def _block_check(case: Case, point: Point, problem: Forms, outputs: dict[str, Tensors]) -> Iterator[Check]:
    """Against float64: at most twice plain torch's own error, or 1e-3 (see `bench.case`), in bfloat16 1e-2."""
    floor = 1e-2 if problem.scalar == "bf16" else 1e-3
    for i, truth in enumerate(block_eager(problem.double())()):
        bound = max(floor, 2 * relative_error(outputs[case.baseline][i], truth))
        for name, values in outputs.items():
            if name != "copy":
                yield Check(name, f"{point.mode}, {point.x}, output {i}", relative_error(values[i], truth), bound)


GPU_BLOCK = Case(
    name="gpu_block",
    metric="time",
    unit="ms",
    x_name="layout",
    providers={
        "eager": Entry(block_eager),
        "compiled": Entry(block_compiled),
        "pydistill": Entry(block_ours),
        "copy": Entry(block_copy),
    },
    full={"shape": (256, 128, 32, 32), "scalars": ("f32", "bf16"), "gate": (3, 5, 9, 7)}
    | {"device": "cuda", "dtype": "named in mode"},
    quick={"shape": (4, 8, 8, 8), "scalars": ("f32", "bf16"), "gate": (3, 5, 9, 7)}
    | {"device": "cuda", "dtype": "named in mode"},
    repeats=20,
    points=_block_points,
    gate=_block_gate,
    check=_block_check,
)


@dataclass(frozen=True)
class Step:
    """One step of E students on shared images: what `quantity` names, at theta and along direction."""

    quantity: str  # "gradient": loss [E], grad [E, P]; "tangent": slope [E], curvature [E, P], d_images [E, N, C, H, W]
    precision: str  # "fp64", "fp32", "tf32", "bf16"
    net: PlainConvNet
    config: Config
    theta: Tensor  # [E, P]
    direction: Tensor  # [E, P]
    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N]

    def double(self) -> Step:
        wide = {name: getattr(self, name).double() for name in ("theta", "direction", "images")}
        return replace(self, precision="fp64", net=copy.deepcopy(self.net).double(), **wide)


def make_step(config: Config, students: int, quantity: str, precision: str, device: str) -> Step:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    made = make_problem(**config | {"steps": 1, "dtype": dtype})
    generator = torch.Generator().manual_seed(1)
    moves = torch.randn((2, students, len(made.theta0)), generator=generator, dtype=torch.float64)
    return Step(
        quantity,
        precision,
        made.net.to(device),
        config,
        (made.theta0 + 0.01 * moves[0]).to(device, dtype),
        moves[1].to(device, dtype),
        made.images.to(device),
        made.labels.to(device),
    )


def _switched(problem: Step, call: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """`call` with TF32 allowed if the problem says so, and otherwise disabled."""

    def run() -> Tensors:
        switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = problem.precision == "tf32"
            return call()
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                switch.allow_tf32 = allowed

    return run


def _autocast(problem: Step) -> torch.autocast:
    return torch.autocast(problem.theta.device.type, torch.bfloat16, enabled=problem.precision == "bf16")


def step_eager(problem: Step) -> Callable[[], Tensors]:
    """Student by student, the tangent by a graph of the gradient."""

    def one(theta: Tensor, direction: Tensor) -> Tensors:
        theta, images = theta.detach().requires_grad_(), problem.images.detach().requires_grad_()
        with _autocast(problem):
            loss = eager.inner_loss(problem.net, theta, images, problem.labels)
        second = problem.quantity == "tangent"
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=second)
        if not second:
            return loss.detach(), gradient
        slope = gradient @ direction
        return slope.detach(), *torch.autograd.grad(slope, (theta, images))

    def call() -> Tensors:
        students = [one(*student) for student in zip(problem.theta, problem.direction, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*students, strict=True))

    return _switched(problem, call)


def step_compiled(problem: Step, mode: str = "default") -> Callable[[], Tensors]:
    """The adjoint of `bench.peers.compiled`, under vmap for more than one student."""

    def loss(theta: Tensor, images: Tensor) -> Tensor:
        with _autocast(problem):
            logits = compiled.logits(problem.net, eager.unflatten(problem.net, theta), images)
        return F.cross_entropy(logits, problem.labels)

    def gradient(theta: Tensor, direction: Tensor) -> Tensors:
        found, value = grad_and_value(loss)(theta, problem.images)
        return value, found

    def tangent(theta: Tensor, direction: Tensor) -> Tensors:
        def both(theta: Tensor) -> Tensors:
            return grad(loss, argnums=(0, 1))(theta, problem.images)

        (found, _), (curvature, d_images) = jvp(both, (theta,), (direction,))
        return found @ direction, curvature, d_images

    one = {"gradient": gradient, "tangent": tangent}[problem.quantity]

    def every(theta: Tensor, direction: Tensor) -> Tensors:
        if len(theta) > 1:
            return vmap(one)(theta, direction)
        return tuple(part.unsqueeze(0) for part in one(theta[0], direction[0]))

    torch.compiler.reset()  # the points of a case share one code object, and its recompilations are limited
    step = torch.compile(every, fullgraph=True, dynamic=False, mode=mode)
    return _switched(problem, torch.no_grad()(lambda: step(problem.theta, problem.direction)))


def step_ours(problem: Step, graphs: bool = False) -> Callable[[], Tensors]:
    from pydistill.ops import _convnet_step_layers as layers
    from pydistill.ops._convnet_step_graph import StepGraphs
    from pydistill.reference.convnet_shape import ConvNetShape

    config = problem.config
    size, padding = config["image_size"], 3 if config["channels"] == 1 else 1
    widths = (config["width"],) * config["depth"]
    shape = ConvNetShape(config["channels"], size, size, widths, padding, config["classes"])
    engine = StepGraphs() if graphs else layers
    options = {"precision": "fp32" if problem.precision == "fp64" else problem.precision}

    def call() -> Tensors:
        batch = (problem.images, problem.labels)
        if problem.quantity == "gradient":
            return engine.gradient(shape, problem.theta, *batch, **options)
        return engine.tangent(shape, problem.theta, problem.direction, *batch, **options)[:3]

    return call


QUANTITIES = ("gradient", "tangent")


def _step_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(
            students,
            partial(make_step, config, students, quantity, precision, config["device"]),
            tuple(case.providers),
            f"{quantity} {precision}",
        )
        for quantity in QUANTITIES
        for precision in config["precisions"]
        for students in config["students"]
    ]


def _step_gate(case: Case, config: Config) -> Iterator[Check]:
    """Float64, small, every output to 1e-10."""
    for quantity in QUANTITIES:
        for students in (1, 3):
            problem = make_step(config["gate"], students, quantity, "fp64", config["device"])
            truths = step_eager(problem)()
            for name, entry in case.providers.items():
                for i, (value, truth) in enumerate(zip(entry.prepare(problem)(), truths, strict=True)):
                    what = f"float64 {quantity}, {students} students, output {i}, relative error"
                    yield Check(name, what, relative_error(value, truth), 1e-10)


def _step_check(case: Case, point: Point, problem: Step, outputs: dict[str, Tensors]) -> Iterator[Check]:
    """Against float64: at most twice the eager loop's own error in that precision, or its floor.

    The loss and the slope, sums that may cancel, are left to the gate.
    """
    floor = {"fp32": 1e-3, "tf32": 0.05, "bf16": 0.15}[problem.precision]
    truths = step_eager(problem.double())()
    for i, truth in list(enumerate(truths))[1:]:
        bound = max(floor, 2 * relative_error(outputs[case.baseline][i], truth))
        for name, values in outputs.items():
            what = f"{point.mode}, {point.x} students, output {i}, relative error"
            yield Check(name, what, relative_error(values[i], truth), bound)


GPU_STEP = Case(
    name="gpu_step",
    metric="time per step of all students",
    unit="ms",
    x_name="students",
    providers={
        "eager": Entry(step_eager),
        "compiled": Entry(partial(step_compiled, mode="reduce-overhead")),
        "layers": Entry(step_ours),
        "layers-graph": Entry(partial(step_ours, graphs=True)),
    },
    full={**CONVNET, "students": (1, 5), "precisions": ("fp32", "tf32", "bf16"), "gate": GATE}
    | {"device": "cuda", "dtype": "named in mode"},
    quick={**SMALL, "students": (1, 2), "precisions": ("fp32", "tf32", "bf16"), "gate": GATE}
    | {"device": "cuda", "dtype": "named in mode"},
    repeats=10,
    points=_step_points,
    gate=_step_gate,
    check=_step_check,
)

CASES = {case.name: case for case in (GPU_BLOCK, GPU_STEP)}
