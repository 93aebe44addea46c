"""Problems for the kernels of instance_norm_relu_avg_pool, plain torch's results for them, and tolerances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydistill.reference import instance_norm_relu_avg_pool as reference

EPS = 1e-3  # far from negligible, so that a kernel that forgets it is caught
GUARD = 64  # elements around every output that must stay as they were
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-9, torch.float16: 2**-12}

INPUTS = {
    "forward": ("x", "weight", "bias"),
    "backward": ("x", "weight", "bias", "grad_y"),
    "jvp": ("x", "weight", "bias", "x_t", "weight_t", "bias_t"),
    "backward_jvp": ("x", "weight", "bias", "grad_y", "x_t", "weight_t", "bias_t", "grad_y_t"),
}
OUTPUTS = {
    "forward": ("y",),
    "backward": ("grad_x", "grad_weight", "grad_bias"),
    "jvp": ("y",),
    "backward_jvp": ("y", "grad_x", "grad_weight", "grad_bias"),
}

Tensors = dict[str, Tensor]


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, relu: bool = True, pool: bool = True
) -> Tensor:
    """The definition, with the public function's options."""
    return reference(x, weight, bias, eps, relu, pool)


def raw_calls(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, relu: bool = True, pool: bool = True
) -> list:
    """The four registered operators of a library, ``torch.ops.NAME``, with the arguments of one case."""
    options = (eps, relu, pool)
    x_t, weight_t, bias_t = (torch.randn_like(t, requires_grad=True) for t in (x, weight, bias))
    grad = torch.randn_like(plain(x.detach(), weight, bias, eps=eps, relu=relu, pool=pool)).detach()
    inputs, direction = (x, weight, bias), (x_t, weight_t, bias_t)
    still = [t.detach() for t in (grad, *inputs, *direction)]  # the last operator has no derivative to ask for
    return [
        (ops.instance_norm_relu_avg_pool.default, (*inputs, *options)),
        (ops.instance_norm_relu_avg_pool_backward.default, (grad.clone().requires_grad_(), *inputs, *options)),
        (ops.instance_norm_relu_avg_pool_jvp.default, (*inputs, *direction, *options)),
        (ops.instance_norm_relu_avg_pool_backward_jvp.default, (still[0], None, *still[1:], *options)),
        (ops.instance_norm_relu_avg_pool_backward_jvp.default, (still[0], still[0], *still[1:], *options)),
    ]


def truth(form: str, given: Tensors, relu: bool, pool: bool) -> Tensors:
    """The form's outputs by torch.func over the plain torch line, in the precision of what is given."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(x, weight, bias, EPS, relu, pool)

    def backward(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        y, pullback = torch.func.vjp(forward, x, weight, bias)
        return y, *pullback(grad_y)

    function: Callable = backward if "backward" in form else forward
    primals = tuple(given[name] for name in ("x", "weight", "bias", "grad_y")[: 4 if "backward" in form else 3])
    if form == "forward":
        return {"y": forward(*primals)}
    if form == "backward":
        return dict(zip(OUTPUTS[form], backward(*primals)[1:], strict=True))
    directions = tuple(given[f"{name}_t"] for name in ("x", "weight", "bias", "grad_y")[: len(primals)])
    tangents = torch.func.jvp(function, primals, directions)[1]
    return {"y": tangents} if form == "jvp" else dict(zip(OUTPUTS[form], tangents, strict=True))


@functools.cache
def problem(shape: tuple[int, ...], relu: bool, pool: bool, dtype: torch.dtype) -> Tensors:
    """Inputs that `dtype` holds exactly, as float64, with no activation so close to 0 that rounding opens its ReLU."""
    N, C, H, W = shape
    shape_y = (N, C, H // 2, W // 2) if pool else shape
    shapes = {"x": shape, "weight": (C,), "bias": (C,), "grad_y": shape_y}
    for seed in range(100):
        random = torch.Generator().manual_seed(seed)
        given = {
            f"{name}{suffix}": torch.randn(size, generator=random).to(dtype).double()
            for suffix in ("", "_t")
            for name, size in shapes.items()
        }
        given["x"] = (given["x"] + 3).to(dtype).double()  # a mean in which sums of squares would drown
        activation = reference(given["x"], given["weight"], given["bias"], EPS, False, False)
        if activation.abs().min() > 1e-5:
            return given
    raise AssertionError("no seed keeps the activations away from 0")


def at_the_edge() -> Tensors:
    """Activations within rounding of 0, and directions in which the result is 1 where the ReLU is open, 0 elsewhere."""
    random = torch.Generator().manual_seed(0)
    half = torch.randint(-2, 3, (2, 5, 4, 8), generator=random).double()
    return {
        "x": torch.cat([half, -half], 2),  # the mean is 0, and so are many activations
        "weight": torch.ones(5).double(),
        "bias": torch.zeros(5).double(),
        "grad_y": torch.ones(2, 5, 8, 8).double(),
        "x_t": torch.zeros(2, 5, 8, 8).double(),
        "weight_t": torch.zeros(5).double(),
        "bias_t": torch.ones(5).double(),
    }


@functools.cache
def solution(form: str, shape: tuple[int, ...], relu: bool, pool: bool, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """The truth in float64, and plain torch's own attempt in `dtype`."""
    given = problem(shape, relu, pool, dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in given.items()}
    return truth(form, given, relu, pool), truth(form, rounded, relu, pool)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if tensor.dim() != 4 or layout == "nchw":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    N, C, H, W = tensor.shape  # a slice of something larger, with a step along W, and NaN in between
    larger = tensor.new_full((N + 1, C + 2, H + 1, 2 * W + 1), float("nan"))
    larger[1:, 1:-1, 1:, 1::2] = tensor
    return larger[1:, 1:-1, 1:, 1::2]


def guarded_like(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """An output of the tensor's shape and strides amid guard cells, and a check that those are unchanged."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.full((span + 2 * GUARD,), -77.0, dtype=tensor.dtype)
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), GUARD).fill_(False)
    output = memory.as_strided(tensor.shape, tensor.stride(), GUARD).fill_(float("nan"))

    def check() -> None:
        assert (memory[outside] == -77).all(), "the kernel wrote outside of its output"

    return output, check


def assert_close(name: str, got: Tensor, want: Tensor, plain: Tensor, dtype: torch.dtype, floors: dict = FLOOR) -> None:
    """At most twice plain torch's own error, as a maximum and as a whole, and the same direction."""
    got, plain = got.double(), plain.double()
    floor = floors[dtype]
    error, allowed = (got - want).abs().max(), 2 * (plain - want).abs().max() + floor * want.abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    error, allowed = (got - want).norm(), 2 * (plain - want).norm() + floor * want.norm()
    assert error <= allowed, f"{name}: error in L2 {error:.2e}, allowed {allowed:.2e}"
    if want.norm() > 0:
        cosine = torch.cosine_similarity(got.flatten(), want.flatten(), 0)
        assert cosine >= 1 - 100 * floor**2 - 1e-14, f"{name}: cosine {cosine}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def student(given: Tensors, e: int, students: int) -> Tensors:
    """One student's part of the joint inputs: its channels."""
    return {name: tensor.chunk(students, 1 if tensor.dim() == 4 else 0)[e] for name, tensor in given.items()}
