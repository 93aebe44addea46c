"""The Triton kernels of instance_norm_relu_avg_pool in Triton's interpreter, against plain torch.

Not collected by itself: `test_instance_norm_relu_avg_pool_triton.py` runs this file in a process of its own, because
the interpreter has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import functools
import mmap

import block_problem
import pytest
import torch
from block_problem import (
    EPS,
    INPUTS,
    OUTPUTS,
    Tensors,
    at_the_edge,
    bits,
    guarded_like,
    laid_out,
    plain,
    problem,
    raw_calls,
    solution,
    student,
    truth,
)
from torch import Tensor

import pydistill
from pydistill import reference
from pydistill.testing import CHECKS, Case, check_op
from pydistill.triton import instance_norm_relu_avg_pool as kernels

LAYOUTS = ("nchw", "channels_last", "slice")
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
OPS = torch.ops.pydistill_triton

# NumPy, which the interpreter sums with, adds up a tile one after another where a GPU forms a tree
FLOOR = block_problem.FLOOR | {torch.float32: 1e-5}
assert_close = functools.partial(block_problem.assert_close, floors=FLOOR)


def run(form: str, given: Tensors, layout: str, dtype: torch.dtype, relu: bool, pool: bool) -> Tensors:
    """The form's outputs, written amid guard cells over NaN, the shares summed; `given` is float64."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor | None] = {
        name: laid_out(given[name].to(dtype if given[name].dim() == 4 else compute), layout)
        for name in INPUTS[form]
        if name in given
    }
    N, C, H, W = tensors["x"].shape
    outputs, checks = {}, []
    for name in OUTPUTS[form]:
        if name in ("grad_weight", "grad_bias"):
            like = torch.empty(N, C, dtype=compute)
        else:
            size = (N, C, H // 2, W // 2) if pool and name == "y" else (N, C, H, W)
            like = laid_out(torch.empty(size, dtype=dtype), layout)
        outputs[name], check = guarded_like(like)
        checks.append(check)
    kernels.launch(tensors | outputs, EPS, relu, pool)
    for name in {"grad_weight", "grad_bias"} & outputs.keys():
        shares = outputs[name]
        outputs[name], check = guarded_like(shares.new_empty(C))
        checks.append(check)
        kernels.sum_over_batch(shares, outputs[name])
    for check in checks:
        check()
    return outputs


@pytest.mark.parametrize("relu_pool", SWITCHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_against_plain_torch(dtype: torch.dtype, layout: str, relu_pool: tuple[bool, bool]) -> None:
    for shape in [(2, 3, 7, 5), (1, 17, 5, 6), (1, 2, 31, 17)]:
        given = problem(shape, *relu_pool, dtype)
        for form in kernels.FORMS:
            want, plain = solution(form, shape, *relu_pool, dtype)
            got = run(form, given, layout, dtype, *relu_pool)
            for name in OUTPUTS[form]:
                assert_close(f"{form} {shape} {name}", got[name], want[name], plain[name], dtype)


@pytest.mark.parametrize("relu_pool", [(True, True), (False, False)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 70, 67), (1, 1, 35, 131)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_streamed_planes(dtype: torch.dtype, layout: str, shape: tuple[int, ...], relu_pool: tuple[bool, bool]) -> None:
    """Planes in several tiles, along one axis and along both."""
    given = problem(shape, *relu_pool, dtype)
    assert kernels.configure(given["x"].to(dtype)).streamed
    for form in kernels.FORMS:
        want, plain = solution(form, shape, *relu_pool, dtype)
        got = run(form, given, layout, dtype, *relu_pool)
        for name in OUTPUTS[form]:
            assert_close(f"{form} {name}", got[name], want[name], plain[name], dtype)


def test_a_launch_hangs_on_x_alone() -> None:
    """More channels change only the number of programs, or students would not get the same bits as alone."""
    for dtype in FLOOR:
        for size in (2, 7, 32, 64, 224):
            for layout in ("nchw", "channels_last"):
                configs = [kernels.configure(laid_out(torch.empty(1, C, size, size, dtype=dtype), layout))
                           for C in (2, 3, 48)]  # fmt: skip
                assert configs[0] == configs[1] == configs[2]
                assert 32 <= configs[0].num_warps * 32 <= 512


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_students_are_channels(dtype: torch.dtype, layout: str) -> None:
    """Three students of 5 channels are 15 channels: each gets the bits that it gets alone."""
    E, C = 3, 5
    given = problem((2, E * C, 7, 6), True, True, dtype)
    for form in kernels.FORMS:
        together = run(form, given, layout, dtype, True, True)
        for e in range(E):
            alone = run(form, student(given, e, E), layout, dtype, True, True)
            for name, tensor in student(together, e, E).items():
                assert torch.equal(bits(tensor), bits(alone[name])), f"{form}, student {e}: {name}"


def test_planes_far_from_zero_keep_their_digits() -> None:
    for shape in [(1, 2, 32, 32), (1, 2, 80, 80)]:
        x = torch.randn(shape, dtype=torch.float64) + 1000
        weight, bias = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        rounded = [t.float() for t in (x, weight, bias)]
        want = reference.instance_norm_relu_avg_pool(rounded[0].double(), weight, bias)
        got = pydistill.instance_norm_relu_avg_pool(*rounded, backend="triton")
        assert (got - want).abs().max() < 2e-3, "float32 holds 1000 to 6e-5, and its sums over a plane not much worse"
        torchs = reference.instance_norm_relu_avg_pool(*rounded)
        assert (got - want).abs().max() <= 2 * (torchs - want).abs().max()


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_the_relu_opens_alike_in_every_form(dtype: torch.dtype) -> None:
    """A forward that is 0 exactly where its gradients are, also for activations within rounding of 0."""
    given = at_the_edge()
    y = run("forward", given, "nchw", dtype, True, False)["y"]
    y_t = run("jvp", given, "nchw", dtype, True, False)["y"]
    both = run("backward_jvp", given, "channels_last", dtype, True, False)["y"]
    grad_bias = run("backward", given, "slice", dtype, True, False)["grad_bias"]
    assert torch.equal(y_t, (y > 0).to(dtype))
    assert torch.equal(both, y_t)
    assert torch.equal(grad_bias.double(), y_t.double().sum((0, 2, 3)))


def test_no_grad_y_t_is_a_grad_y_t_of_zeros() -> None:
    given = dict(problem((2, 9, 6, 7), True, True, torch.float32))
    given["grad_y_t"] = torch.zeros_like(given["grad_y"])
    zeros = run("backward_jvp", given, "channels_last", torch.float32, True, True)
    del given["grad_y_t"]
    absent = run("backward_jvp", given, "channels_last", torch.float32, True, True)
    assert all(torch.equal(zeros[name], absent[name]) for name in zeros)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_inf_spoil_their_plane_and_no_other(dtype: torch.dtype, bad: float) -> None:
    given = dict(problem((2, 3, 7, 5), True, True, dtype))
    for name in ("x", "x_t"):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][1, 2, 3, 3] = bad
        for form in kernels.FORMS:
            if name not in INPUTS[form]:
                continue
            got = run(form, spoiled, "channels_last", dtype, True, True)
            for output in {"y", "grad_x"} & got.keys():
                planes = got[output].isnan().flatten(2)
                # a ReLU that stays closed hides a NaN in x_t, but not one in x
                assert planes[1, 2].all() if name == "x" else planes[1, 2].any(), f"{form} {output}"
                planes[1, 2] = False
                assert not planes.any(), f"{form} {output}"


def test_planes_of_one_position_and_empty_batches() -> None:
    one = problem((3, 9, 1, 1), True, False, torch.float32)
    for form in kernels.FORMS:
        got = run(form, one, "nchw", torch.float32, True, False)
        for name, want in truth(form, one, True, False).items():
            torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=1e-5)
    x = torch.empty(0, 9, 4, 4, requires_grad=True)
    weight, bias = (torch.randn(9, requires_grad=True) for _ in range(2))
    y = pydistill.instance_norm_relu_avg_pool(x, weight, bias, backend="triton")
    assert y.shape == (0, 9, 2, 2)
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert all(torch.equal(got, torch.zeros_like(of)) for got, of in zip(gradients, (x, weight, bias), strict=True))


@pytest.mark.parametrize(("N", "C"), [(1, 1), (37, 33), (100, 5), (0, 9)])
def test_sum_over_batch(N: int, C: int) -> None:
    shares = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 1000
    total, check = guarded_like(torch.empty(C))
    kernels.sum_over_batch(shares, total)
    check()
    assert torch.equal(total, shares.double().sum(0).float())


def test_offsets_beyond_32_bits() -> None:
    """Two samples 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 5
    memory = mmap.mmap(-1, 2 * (far + 1000), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 3, 6, 6), (far, 36, 6, 1))
    values = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    x.copy_(values)
    results = []
    for tensor in (x, values):
        y = torch.full((2, 3, 3, 3), float("nan"), dtype=torch.bfloat16)
        kernels.forward(y, tensor, torch.ones(3), torch.zeros(3), EPS, True, True)
        results.append(y)
    assert torch.equal(*results)
    del x, tensor
    results.clear()


# The operator, not its kernels: backend="triton" composes with torch as the native one does.


def images(shape: tuple[int, ...], layout: str = "nchw"):
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = problem(shape, True, True, torch.float32)
        return laid_out(given["x"].to(dtype), layout), given["weight"].to(dtype), given["bias"].to(dtype)

    return make


triton_op = functools.partial(pydistill.instance_norm_relu_avg_pool, backend="triton")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_matrix_of_properties(check: str) -> None:
    calls = functools.partial(raw_calls, OPS)
    check_op(triton_op, plain, [Case("small", images((1, 2, 4, 5)))], raw_calls=calls, checks=[check])


@pytest.mark.parametrize(
    "case",
    [
        Case("channels_last, odd", images((2, 3, 7, 5), "channels_last")),
        Case("slice, no pool", images((1, 2, 3, 4), "slice"), {"pool": False}),
        Case("no relu", images((1, 2, 4, 6)), {"relu": False}),
    ],
    ids=lambda case: case.name,
)
def test_first_and_second_derivatives(case: Case) -> None:
    check_op(triton_op, plain, [case], checks=["values", "func"])


def test_third_derivative_is_refused() -> None:
    x, weight, bias = (t.requires_grad_() for t in images((1, 2, 4, 4))(torch.float64))
    (first,) = torch.autograd.grad(triton_op(x, weight, bias).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        torch.autograd.grad(second.square().sum(), x)


def test_auto_is_still_the_cpu_kernel() -> None:
    x, weight, bias = (t.requires_grad_() for t in images((2, 2, 4, 4))(torch.float32))
    auto, cpu = (pydistill.instance_norm_relu_avg_pool(x, weight, bias, backend=name) for name in ("auto", "cpu"))
    assert torch.equal(auto, cpu)
    y = triton_op(x, weight, bias)
    assert type(y.grad_fn) is not type(auto.grad_fn), "each backend has operators of its own"


def test_direct_calls_never_read_astray() -> None:
    x, weight, bias = images((2, 3, 4, 4))(torch.float32)
    options = (1e-5, True, True)
    for args, message in [
        ((x, weight.double(), bias), r"weight: expected \[3\] of torch.float32 on cpu, got \[3\] of torch.float64"),
        ((x, torch.ones(6)[::2], bias), "weight: expected a contiguous tensor"),
        ((x, weight, torch.ones(2)), r"bias: expected \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPS.instance_norm_relu_avg_pool(*args, *options)
    with pytest.raises(ValueError, match=r"grad_y: expected \[2, 3, 2, 2\]"):
        OPS.instance_norm_relu_avg_pool_backward(x, x, weight, bias, *options)
