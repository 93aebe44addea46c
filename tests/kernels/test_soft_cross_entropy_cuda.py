"""The CUDA kernels of soft_cross_entropy, run on the host machine, against plain torch."""

from __future__ import annotations

import mmap

import pytest
import torch
from host_machine import SCALARS, HostMachine
from torch import Tensor

from bench.block_forms import FORMS
from pydistill.ops.soft_cross_entropy import KINDS
from pydistill.reference import soft_cross_entropy as reference

OUTPUTS = {
    "forward": ("loss",),
    "backward": ("grad_logits", "grad_labels"),
    "jvp": ("loss",),
    "backward_jvp": ("loss", "grad_logits", "grad_labels"),
}
# four rows a block, lanes with a stride of 32
SHAPES = [(5, 10), (4, 31), (3, 32), (1, 33), (9, 1), (2, 1009), (6, 2)]
# each rounding of a result is within eps / 2; those before it are float32's (float64's)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}

Tensors = dict[str, Tensor]


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem(N: int, K: int, kind: str, dtype: torch.dtype) -> Tensors:
    """Inputs and directions that `dtype` holds exactly."""
    random = torch.Generator().manual_seed(N * K)
    given = {name: torch.randn(N, K, generator=random) for name in ("logits", "logits_t", "labels", "labels_t")}
    given["logits"] = 3 * given["logits"] + 5
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    if kind == "hard":
        del given["labels_t"]
        given["labels"] = torch.arange(N) * 7 % K
    return given | {name: torch.randn(N, generator=random).to(compute(dtype)) for name in ("grad", "grad_t")}


def truth(form: str, kind: str, given: Tensors) -> Tensors:
    """The form's outputs by torch.func over the plain torch line, in float64."""
    given = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    hard = kind == "hard"

    def forward(logits: Tensor, *labels: Tensor) -> Tensor:
        return reference(logits, given["labels"] if hard else labels[0], kind, "none")

    def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        loss, pullback = torch.func.vjp(forward, *inputs)
        return loss, *pullback(grad)

    names = ("logits",) if hard else ("logits", "labels")
    inputs, direction = tuple(given[name] for name in names), tuple(given[f"{name}_t"] for name in names)
    if form == "forward":
        out = (forward(*inputs),)
    elif form == "backward":
        out = backward(given["grad"], *inputs)[1:]
    elif form == "jvp":
        out = (torch.func.jvp(forward, inputs, direction)[1],)
    else:
        out = torch.func.jvp(backward, (given["grad"], *inputs), (given["grad_t"], *direction))[1]
    return dict(zip(OUTPUTS[form], out, strict=False))


def run(host: HostMachine, form: str, kind: str, given: Tensors, seed: int = 0) -> Tensors:
    """The form's outputs; each ends in a row that must stay as it was."""
    logits = given["logits"]
    N, K = logits.shape
    empty = {"loss": (N + 1,), "grad_logits": (N + 1, K), "grad_labels": (N + 1, K)}
    outputs = {
        name: torch.full(empty[name], -77.0, dtype=compute(logits.dtype) if name == "loss" else logits.dtype)
        for name in OUTPUTS[form]
        if name != "grad_labels" or kind != "hard"
    }
    names = {"logits", "labels"}
    if "jvp" in form:
        names |= {"logits_t", "labels_t"}
    if "backward" in form:
        names |= {"grad"}
    if form == "backward_jvp":
        names |= {"grad_t"}
    tensors = {name: tensor for name, tensor in given.items() if name in names}
    host.soft_cross_entropy(form, KINDS.index(kind), seed=seed, **tensors, **outputs)
    assert all((out[N:] == -77).all() for out in outputs.values()), "the kernel wrote outside of its output"
    return {name: out[:N] for name, out in outputs.items()}


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, scale: Tensor) -> None:
    got, floor = got.double(), TOLERANCE[dtype]
    assert got.shape == want.shape, name
    assert torch.isfinite(got).all(), name
    assert (got - want).abs().max() <= floor * scale + 1e-30, f"{name}: {(got - want).abs().max():.2e} of {scale:.2e}"
    assert (got - want).norm() <= floor * max(want.norm(), scale) + 1e-30, f"{name}: off in L2"
    assert not ((got == 0) & (want.abs() > floor * scale)).any(), f"{name}: lost values"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SCALARS, ids=str)
def test_against_plain_torch(host: HostMachine, dtype: torch.dtype, kind: str) -> None:
    for shape in SHAPES:
        given = problem(*shape, kind, dtype)
        for form in FORMS:
            want, got, again = truth(form, kind, given), *(run(host, form, kind, given, seed) for seed in (1, 2))
            assert got.keys() == want.keys()
            for name in got:
                of_loss = compute(dtype) if name == "loss" else dtype
                # one class: every derivative is zero up to rounding, which the scale does not bound
                if shape[1] == 1:
                    torch.testing.assert_close(got[name].double(), want[name], rtol=TOLERANCE[of_loss], atol=1e-6)
                else:
                    # a loss's tangent is what remains of sums of the loss's size
                    scale = (truth("forward", kind, given)["loss"] if name == "loss" else want[name]).abs().max()
                    assert_close(f"{form} {shape} {name}", got[name], want[name], of_loss, scale)
                assert torch.equal(got[name], again[name]), f"{form} {shape} {name}: the order shows"


@pytest.mark.parametrize("kind", KINDS)
def test_strides(host: HostMachine, kind: str) -> None:
    """Slices of something larger with NaN in between, transposed tensors and an expanded gradient."""
    dense = problem(5, 37, kind, torch.float32)
    dense["grad"] = dense["grad"][:1].expand(5)

    def sliced(tensor: Tensor) -> Tensor:
        wide = torch.full([2 * size + 1 for size in tensor.shape], float("nan"))
        view = (wide if tensor.is_floating_point() else wide.nan_to_num(-9).long())[(slice(1, None, 2),) * tensor.dim()]
        return view.copy_(tensor)

    for form in FORMS:
        want = run(host, form, kind, {**dense, "grad": dense["grad"].contiguous()})
        for arranged in (sliced, lambda t: t.t().contiguous().t()):
            got = run(
                host,
                form,
                kind,
                {name: arranged(t) for name, t in dense.items() if name != "grad"} | {"grad": dense["grad"]},
            )
            assert all(torch.equal(got[name], want[name]) for name in want), form


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_t_is_a_grad_t_of_zeros(host: HostMachine, kind: str) -> None:
    given = problem(3, 10, kind, torch.float32)
    given["grad_t"] = torch.zeros(3)
    zeros = run(host, "backward_jvp", kind, given)
    del given["grad_t"]
    absent = run(host, "backward_jvp", kind, given)
    assert all(torch.equal(zeros[name], absent[name]) for name in zeros)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_spoil_their_row_and_no_other(host: HostMachine, kind: str, bad: float) -> None:
    given = problem(6, 40, kind, torch.float32)
    given["logits"][2, 35] = bad
    for form in FORMS:
        for name, got in run(host, form, kind, given).items():
            rows = got.isnan().view(6, -1)
            assert rows[2].any() if name == "grad_labels" else rows[2].all(), f"{form} {name}"
            assert not rows[[0, 1, 3, 4, 5]].any(), f"{form} {name}"


def test_masked_classes(host: HostMachine) -> None:
    """A logit of -inf affects nothing but its own label's loss."""
    given = problem(2, 10, "hard", torch.float32)
    given["logits"][:, 3] = float("-inf")
    for form in FORMS:
        want = truth(form, "hard", given)
        for name, got in run(host, form, "hard", given).items():
            torch.testing.assert_close(got.double(), want[name], rtol=1e-5, atol=1e-6)


def test_class_numbers_out_of_range_make_their_rows_nan(host: HostMachine) -> None:
    given = problem(6, 5, "hard", torch.float32)
    given["labels"] = torch.tensor([0, -1, 4, 5, 2**40, -100])
    for form in FORMS:
        for name, got in run(host, form, "hard", given).items():
            spoiled = got.isnan().view(6, -1)
            assert torch.equal(spoiled.all(1), torch.tensor([False, True, False, True, True, True])), f"{form} {name}"
            assert not spoiled[[0, 2]].any()


def test_no_rows(host: HostMachine) -> None:
    for kind in KINDS:
        for form in FORMS:
            run(host, form, kind, problem(0, 3, kind, torch.float32))


def test_offsets_beyond_32_bits(host: HostMachine) -> None:
    """Two rows 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 5
    memory = mmap.mmap(-1, 2 * (far + 1000), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    given = problem(2, 40, "hard", torch.bfloat16)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 40), (far, 1))
    logits.copy_(given["logits"])
    got = run(host, "forward", "hard", {**given, "logits": logits})
    assert torch.equal(got["loss"], run(host, "forward", "hard", given)["loss"])
    del logits
