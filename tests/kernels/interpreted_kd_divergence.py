"""The Triton kernel of kd_divergence in Triton's interpreter, against plain torch.

Not collected by itself: `test_kd_divergence_triton.py` runs this file in a process of its own, because the interpreter
has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydistill import kd_divergence, reference
from pydistill.ops.kd_divergence import KINDS
from pydistill.testing import assert_close
from pydistill.triton import kd_divergence as kernels
from tests.divergence.edges import ROWS, check_divergence

OPS = torch.ops.pydistill_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(N: int, C: int, kind: str, target_is: str = "logits") -> tuple[Tensor, Tensor, dict]:
    """As float64; the target has numbers that are exact in every dtype."""
    generator = torch.Generator().manual_seed(N * C)
    student = 2 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (N,), generator=generator)
    target = torch.randint(-64, 64, (N, C), generator=generator).double() / 16
    if target_is == "probs":
        target = torch.randint(1, 64, (N, C), generator=generator).double() / 128
    options = {"kind": kind, "target_is": target_is, "reduction": "none", "beta": 0.25, "gamma": 1.5, "T": 2.0}
    if kind == "ce":
        return student, labels, options
    return student, target, options | ({"labels": labels} if kind == "ofa" else {})


def orders(function: Callable, student: Tensor, target: Tensor, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Loss, gradient as kept and as recomputed, and second derivatives."""
    x = student.to(dtype).requires_grad_()
    if target.is_floating_point():
        target = target.to(dtype)
    if "weight" in options:
        options["weight"] = options["weight"].to(dtype)
    loss = function(x, target, **options)
    weights = torch.linspace(0.5, 2, max(1, loss.numel()), dtype=torch.float64).to(dtype).reshape(loss.shape)
    weights.requires_grad_()
    (kept,) = torch.autograd.grad(loss, x, weights.detach(), retain_graph=True)
    kept = kept.clone()
    (first,) = torch.autograd.grad(loss, x, weights, create_graph=True)
    direction = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape).to(dtype)
    second = torch.autograd.grad(first, (x, weights), direction)
    return {"loss": loss, "kept": kept, "gradient": first, "second in x": second[0], "in the gradient": second[1]}


def compare(student: Tensor, target: Tensor, dtype: torch.dtype, **options) -> None:
    truth = orders(reference.kd_divergence, student.to(dtype).double(), target, torch.float64, **options)
    plain = orders(reference.kd_divergence, student, target, dtype, **options)
    found = orders(kd_divergence, student, target, dtype, backend="triton", **options)
    for name, value in found.items():
        assert value.dtype == dtype
        rtol = max(1e-5, 16 * torch.finfo(dtype).eps)
        assert_close(f"{options['kind']} {name}", value, truth[name], plain[name], rtol=rtol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_plain_torch(dtype: torch.dtype, kind: str) -> None:
    for target_is in ("logits",) if kind in ("ce", "mse") else ("logits", "probs"):
        student, target, options = problem(3, 37, kind, target_is)
        compare(student, target, dtype, **options)
        if kind != "ce":
            labels = options.get("labels", torch.tensor([0, 36, 5]))
            compare(student, target, dtype, **options | {"labels": labels, "ce_weight": 0.75})


# tiles of 32 to 512 classes, and rows of several
@pytest.mark.parametrize("C", [1, 31, 32, 33, 512, 513, 1030])
def test_partial_tiles(C: int) -> None:
    for kind in ("fkl", "jsd"):
        student, target, options = problem(2, C, kind)
        compare(student, target, torch.float32, **options | {"T": 1.0})


def test_layouts_reductions_and_weights() -> None:
    student, target, options = problem(5, 40, "rkl")
    columns = [x.t().contiguous().t() for x in (student, target)]
    compare(*columns, torch.float32, **options)
    compare(student[:1].expand(5, 40), target, torch.float32, **options)
    wide = torch.zeros(10, 121, dtype=torch.float64)
    wide[1::2, 1::3] = student
    compare(wide[1::2, 1::3], target, torch.float32, **options)
    weight = torch.linspace(0.5, 1, 5, dtype=torch.float64)
    for reduction in ("batchmean", "mean", "sum"):
        compare(student, target, torch.float32, **options | {"reduction": reduction, "weight": weight})


def test_half_precision_target_beside_float32() -> None:
    student, target, options = problem(3, 37, "fkl")
    one, other = (
        kd_divergence(student.float(), t, backend="triton", **options) for t in (target.half(), target.float())
    )
    assert torch.equal(one, other)


def test_forward_mode() -> None:
    student, target, options = problem(3, 37, "jsd")
    x, direction = student.float(), torch.randn(3, 37)
    for function, given in ((kd_divergence, {"backend": "triton"}), (reference.kd_divergence, {})):
        found = torch.func.jvp(lambda x: function(x, target.float(), **options, **given), (x,), (direction,))  # noqa: B023
        if function is kd_divergence:
            actual = found
    torch.testing.assert_close(actual, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd", "soft_ce"])
def test_masked_classes_take_no_part(kind: str) -> None:
    student, target, options = problem(3, 30, kind)
    padding = torch.full((3, 9), -torch.inf, dtype=torch.float64)
    truth = orders(kd_divergence, student, target, torch.float32, **options)
    padded = [torch.cat([x, padding], 1) for x in (student, target)]
    for name, value in orders(kd_divergence, *padded, torch.float32, backend="triton", **options).items():
        value = value[:, :30] if value.dim() == 2 else value
        if name not in ("second in x", "in the gradient"):  # their direction has other numbers
            torch.testing.assert_close(value, truth[name], rtol=1e-5, atol=1e-6)
        assert value.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_edges(kind: str) -> None:
    def loss(*args, **options):
        return kd_divergence(*args, backend="triton", **options)

    for edge in [name for name in ROWS if kind != "mse" or "masked" not in name]:
        for T in (0.05, 50.0):
            for probs in (False, True) if kind not in ("ce", "mse") else (False,):
                check_divergence(loss, edge, kind, T, probs, torch.float32)


def test_nan_shows_where_it_is() -> None:
    for kind in KINDS:
        student, target, options = problem(4, 6, kind)
        student[2, 3] = torch.nan
        x = student.float().requires_grad_()
        target = target.float() if kind != "ce" else target
        loss = kd_divergence(x, target, backend="triton", **options)
        assert loss.isnan().tolist() == [False, False, True, False]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isnan().any(1).tolist() == [False, False, True, False]


def test_class_numbers_out_of_range_make_their_row_nan() -> None:
    x, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([-1, 2, 4])
    for kind, target, weight in ((4, None, 0.0), (6, torch.randn(3, 4), 0.0), (0, torch.randn(3, 4), 1.0)):
        loss = OPS.kd_divergence(x, target, labels, kind, False, 2.0, 1.0, weight, 0.5, 1.0, True)[0]
        assert loss.isnan().tolist() == [True, False, True]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("form", kernels.FORMS)
def test_nothing_is_written_outside(form: str) -> None:
    """Outputs amid guard cells."""
    N, C, options = 3, 37, (1, False, 2.0, 4.0, 0.5, 0.25, 1.0)
    x, target, x_t = (torch.randn(N, C) for _ in range(3))
    labels, grad = torch.tensor([0, 36, 5]), torch.randn(N)

    def guarded(*shape: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((torch.Size(shape).numel() + 256,), 7.0)
        memory[128:-128] = torch.nan
        return memory, memory[128:-128].view(shape)

    held = [guarded(N), guarded(N, C)]
    outputs = [view for _, view in held]
    inputs = (x, target, labels)
    if form == "forward":
        kernels.forward(tuple(outputs), *inputs, *options, True)
    elif form == "backward":
        held = held[1:]
        kernels.backward(outputs[1], grad, *inputs, *options)
    elif form == "jvp":
        held = held[:1]
        kernels.jvp(outputs[0], *inputs, x_t, *options)
    else:
        kernels.backward_jvp(tuple(outputs), grad, grad, *inputs, x_t, *options)
    for memory, view in held:
        assert view.isfinite().all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()


def test_registrations() -> None:
    x, target, x_t = (torch.randn(3, 7) for _ in range(3))
    grad, options = torch.randn(3), (0, False, 2.0, 4.0, 0.0, 0.5, 1.0)
    torch.library.opcheck(OPS.kd_divergence.default, (x.clone().requires_grad_(), target, None, *options, True))
    torch.library.opcheck(OPS.kd_divergence_backward.default, (grad, x, target, None, *options))
    torch.library.opcheck(OPS.kd_divergence_jvp.default, (x, target, None, x_t, *options))
    torch.library.opcheck(OPS.kd_divergence_backward_jvp.default, (grad, None, x, target, None, x_t, *options))


def test_no_rows_and_no_float64() -> None:
    x = torch.randn(0, 4, requires_grad=True)
    loss = kd_divergence(x, torch.randn(0, 4), reduction="sum", backend="triton")
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].shape == (0, 4)
    with pytest.raises(NotImplementedError, match="kd_divergence: backend='triton' has no kernel for float64"):
        kd_divergence(torch.randn(2, 3).double(), torch.randn(2, 3), backend="triton")
