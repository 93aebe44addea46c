"""The CUDA kernels of instance_norm_relu_avg_pool, run on the host machine, against plain torch."""

from __future__ import annotations

import mmap

import pytest
import torch
from block_problem import (
    EPS,
    INPUTS,
    OUTPUTS,
    Tensors,
    assert_close,
    at_the_edge,
    bits,
    guarded_like,
    laid_out,
    problem,
    solution,
    student,
    truth,
)
from host_machine import HostMachine

from bench.block_forms import FORMS
from bench.kernels import Launch

SECTOR = {torch.float32: 8, torch.float64: 4, torch.bfloat16: 16, torch.float16: 16}  # elements: channels of a block


def run(
    host: HostMachine,
    form: str,
    given: Tensors,
    layout: str,
    dtype: torch.dtype,
    relu: bool,
    pool: bool,
    **options: int,
) -> tuple[Tensors, Launch]:
    """The form's outputs, the shares of grad_weight and grad_bias summed; `given` is float64."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        name: laid_out(given[name].to(dtype if given[name].dim() == 4 else compute), layout)
        for name in INPUTS[form]
        if name in given
    }
    x, checks, outputs = tensors.pop("x"), [], {}
    N, C, H, W = x.shape
    for name in OUTPUTS[form]:
        if name in ("grad_weight", "grad_bias"):
            like = torch.empty(N, C, dtype=compute)
        else:
            size = (N, C, H // 2, W // 2) if pool and name == "y" else x.shape
            like = laid_out(torch.empty(size, dtype=dtype), layout)
        outputs[name], check = guarded_like(like)
        checks.append(check)
    launch = host.instance_norm_relu_avg_pool(form, x=x, eps=EPS, relu=relu, pool=pool, **tensors, **outputs, **options)
    for check in checks:
        check()
    for name in {"grad_weight", "grad_bias"} & outputs.keys():
        outputs[name] = host.sum_over_batch(outputs[name].contiguous(), options.get("seed", 0))
    return outputs, launch


def shapes(dtype: torch.dtype) -> list[tuple[int, ...]]:
    lanes = SECTOR[dtype]
    return [(2, 3, 7, 5), (1, lanes - 1, 5, 11), (2, lanes, 4, 6), (1, lanes + 1, 13, 7), (3, 1, 17, 2), (1, 2, 31, 29)]


@pytest.mark.parametrize("relu_pool", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", SECTOR, ids=str)
def test_against_plain_torch(host: HostMachine, dtype: torch.dtype, layout: str, relu_pool: tuple[bool, bool]) -> None:
    for shape in shapes(dtype):
        given = problem(shape, *relu_pool, dtype)
        for form in FORMS:
            want, plain = solution(form, shape, *relu_pool, dtype)
            got, launch = run(host, form, given, layout, dtype, *relu_pool, seed=1)
            assert launch.kept
            again, _ = run(host, form, given, layout, dtype, *relu_pool, seed=2)
            for name in OUTPUTS[form]:
                assert_close(f"{form} {shape} {name}", got[name], want[name], plain[name], dtype)
                assert torch.equal(bits(got[name]), bits(again[name])), f"{form} {shape} {name}: the order shows"


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", SECTOR, ids=str)
def test_streamed_panels(host: HostMachine, dtype: torch.dtype, layout: str) -> None:
    """The same results if shared memory holds no panel, and the same bits with equally many channels per block."""
    shape = (1, SECTOR[dtype] + 1, 31, 29)
    given = problem(shape, True, True, dtype)
    scarce = 4096 if layout == "channels_last" else 1024  # room for the sums over a block, and little more
    for form in FORMS:
        want, plain = solution(form, shape, True, True, dtype)
        kept, kept_launch = run(host, form, given, layout, dtype, True, True)
        streamed, launch = run(host, form, given, layout, dtype, True, True, seed=1, shared_limit=scarce)
        assert kept_launch.kept
        assert not launch.kept
        assert launch.lanes == kept_launch.lanes
        for name in OUTPUTS[form]:
            assert_close(f"{form} {name}", streamed[name], want[name], plain[name], dtype)
            assert torch.equal(bits(kept[name]), bits(streamed[name])), f"{form} {name}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_planes_of_many_warps(host: HostMachine, layout: str) -> None:
    shape = (2, 8, 32, 32)
    given = problem(shape, True, True, torch.float32)
    for form in FORMS:
        want, plain = solution(form, shape, True, True, torch.float32)
        got, launch = run(host, form, given, layout, torch.float32, True, True)
        assert launch.kept
        assert launch.threads == (512 if layout == "channels_last" else 128)
        for name in OUTPUTS[form]:
            assert_close(f"{form} {name}", got[name], want[name], plain[name], torch.float32)


def test_all_forms_sum_in_one_order(host: HostMachine) -> None:
    """Whatever fits, a block has the same channels and threads in every form, or masks could differ in a last bit."""
    given = problem((1, 9, 12, 12), True, True, torch.float32)
    seen = {}
    for limit in (16000, 8000, 4000, 2000, 1000):
        for form in FORMS:
            got, launch = run(host, form, given, "channels_last", torch.float32, True, True, shared_limit=limit)
            seen.setdefault(limit, []).append((launch.lanes, launch.threads, bool(launch.kept)))
            assert launch.shared_bytes <= limit
            for name, want in truth(form, given, True, True).items():
                torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-4)
    assert all(len({plan[:2] for plan in plans}) == 1 for plans in seen.values())
    lanes_and_kept = [(plans[0][0], [plan[2] for plan in plans]) for plans in seen.values()]
    assert lanes_and_kept == [
        (8, [True, True, True, True]),
        (4, [True, True, True, True]),
        (2, [True, True, True, True]),
        (2, [True, True, False, False]),
        (8, [False, False, False, False]),
    ]


@pytest.mark.parametrize("dtype", SECTOR, ids=str)
def test_the_relu_opens_alike_in_every_form(host: HostMachine, dtype: torch.dtype) -> None:
    """A forward that is 0 exactly where its gradients are, also for activations within rounding of 0."""
    given = at_the_edge()
    y = run(host, "forward", given, "nchw", dtype, True, False)[0]["y"]
    y_t = run(host, "jvp", given, "nchw", dtype, True, False)[0]["y"]
    both = run(host, "backward_jvp", given, "channels_last", dtype, True, False)[0]["y"]
    grad_bias = run(host, "backward", given, "slice", dtype, True, False)[0]["grad_bias"]
    assert torch.equal(y_t, (y > 0).to(dtype))
    assert torch.equal(both, y_t)
    assert torch.equal(grad_bias.double(), y_t.double().sum((0, 2, 3)))


def test_no_grad_y_t_is_a_grad_y_t_of_zeros(host: HostMachine) -> None:
    given = dict(problem((2, 9, 6, 7), True, True, torch.float32))
    given["grad_y_t"] = torch.zeros_like(given["grad_y"])
    zeros, _ = run(host, "backward_jvp", given, "channels_last", torch.float32, True, True)
    del given["grad_y_t"]
    absent, _ = run(host, "backward_jvp", given, "channels_last", torch.float32, True, True)
    assert all(torch.equal(zeros[name], absent[name]) for name in zeros)


def test_expanded_gradient(host: HostMachine) -> None:
    """y.sum().backward() gives a grad_y whose strides are all 0."""
    given = dict(problem((2, 9, 6, 7), True, True, torch.float32))
    given["grad_y"] = torch.ones_like(given["grad_y"])
    want, _ = run(host, "backward", given, "nchw", torch.float32, True, True)
    x, weight, bias = (given[name].float() for name in ("x", "weight", "bias"))
    shares = {name: torch.full((2, 9), float("nan")) for name in ("grad_weight", "grad_bias")}
    grad_x, grad_y = torch.full_like(x, float("nan")), torch.ones(()).expand(2, 9, 3, 3)
    host.instance_norm_relu_avg_pool(
        "backward", x=x, weight=weight, bias=bias, grad_y=grad_y, grad_x=grad_x, eps=EPS, relu=True, pool=True, **shares
    )
    assert torch.equal(grad_x, want["grad_x"])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", SECTOR, ids=str)
def test_students_are_channels(host: HostMachine, dtype: torch.dtype, layout: str) -> None:
    """Three students of 5 channels are 15 channels: each gets the bits that it gets alone."""
    E, C = 3, 5
    given = problem((2, E * C, 7, 6), True, True, dtype)
    for form in FORMS:
        together, _ = run(host, form, given, layout, dtype, True, True, seed=1)
        for e in range(E):
            alone, _ = run(host, form, student(given, e, E), layout, dtype, True, True, seed=2)
            for name, tensor in student(together, e, E).items():
                assert torch.equal(bits(tensor), bits(alone[name])), f"{form}, student {e}: {name}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", SECTOR, ids=str)
def test_nan_and_inf_spoil_their_plane_and_no_other(
    host: HostMachine, dtype: torch.dtype, bad: float, layout: str
) -> None:
    given = dict(problem((2, 3, 7, 5), True, True, dtype))
    for name in ("x", "x_t"):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][1, 2, 3, 3] = bad
        for form in FORMS:
            if name not in INPUTS[form]:
                continue
            got, _ = run(host, form, spoiled, layout, dtype, True, True)
            for output in {"y", "grad_x"} & got.keys():
                planes = got[output].isnan().flatten(2)
                # a ReLU that stays closed hides a NaN in x_t, but not one in x
                assert planes[1, 2].all() if name == "x" else planes[1, 2].any(), f"{form} {output}"
                planes[1, 2] = False
                assert not planes.any(), f"{form} {output}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_planes_of_one_position_and_empty_batches(host: HostMachine, layout: str) -> None:
    one = problem((3, 9, 1, 1), True, False, torch.float32)
    for form in FORMS:
        got, _ = run(host, form, one, layout, torch.float32, True, False)
        want = truth(form, one, True, False)
        for name in OUTPUTS[form]:
            torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5)
    empty = {name: tensor[:0] if tensor.dim() == 4 else tensor for name, tensor in one.items()}
    x = empty["x"].float()
    assert host.instance_norm_relu_avg_pool("forward", x=x, y=x, eps=EPS, relu=True, pool=False).blocks == 0
    assert torch.equal(host.sum_over_batch(torch.empty(0, 9)), torch.zeros(9))


@pytest.mark.parametrize(("N", "C"), [(1, 1), (37, 33), (100, 5)])
def test_sum_over_batch(host: HostMachine, N: int, C: int) -> None:
    shares = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 1000
    total = host.sum_over_batch(shares)
    assert torch.equal(total, shares.double().sum(0).float())
    assert torch.equal(total, host.sum_over_batch(shares, seed=1))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_a_kept_panel_is_read_once_and_written_once(host: HostMachine, form: str, layout: str) -> None:
    given = problem((1, 16, 16, 16), True, True, torch.bfloat16)
    got, launch = run(host, form, given, layout, torch.bfloat16, True, True)
    read = sum(given[name].numel() * 2 for name in INPUTS[form] if given[name].dim() == 4)
    written = sum(got[name].numel() * 2 for name in OUTPUTS[form] if got[name].dim() == 4)
    assert launch.bytes_loaded + launch.bytes_stored <= 1.05 * (read + written)  # the shares as well


def test_offsets_beyond_32_bits(host: HostMachine) -> None:
    """Two samples 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 5
    memory = mmap.mmap(-1, 2 * (far + 1000), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 3, 6, 6), (far, 36, 6, 1))
    values = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    x.copy_(values)
    weight, bias = torch.ones(3), torch.zeros(3)
    results = []
    for tensor in (x, values):
        y = torch.full((2, 3, 3, 3), float("nan"), dtype=torch.bfloat16)
        host.instance_norm_relu_avg_pool(
            "forward", x=tensor, weight=weight, bias=bias, y=y, eps=EPS, relu=True, pool=True
        )
        results.append(y)
    assert torch.equal(*results)
    del x, tensor
    results.clear()
