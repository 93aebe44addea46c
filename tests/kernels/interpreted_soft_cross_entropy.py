"""The Triton kernel of soft_cross_entropy in Triton's interpreter, against plain torch.

Not collected by itself: `test_soft_cross_entropy_triton.py` runs this file in a process of its own, because the
interpreter has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydistill import reference, soft_cross_entropy
from pydistill.ops.soft_cross_entropy import KINDS
from pydistill.testing import CHECKS, Case, check_op
from pydistill.triton import soft_cross_entropy as kernels
from tests.ops.test_soft_cross_entropy import plain, rows

OPS = torch.ops.pydistill_triton


def ours(logits: Tensor, *soft: Tensor, kind: str, hard: Tensor | None = None, reduction: str = "mean") -> Tensor:
    labels = hard if kind == "hard" else soft[0]
    return soft_cross_entropy(logits, labels, label_kind=kind, reduction=reduction, backend="triton")


def raw_calls(logits: Tensor, *soft: Tensor, kind: str, hard: Tensor | None = None, reduction: str = "mean") -> list:
    labels, number = hard if kind == "hard" else soft[0], KINDS.index(kind)
    logits_t = torch.randn_like(logits, requires_grad=True)
    labels_t = logits.new_empty(len(logits), 0) if kind == "hard" else torch.randn_like(labels, requires_grad=True)
    grad = torch.randn(len(logits), dtype=logits.dtype)
    still = [t.detach() for t in (logits, labels, logits_t, labels_t)]
    return [
        (OPS.soft_cross_entropy.default, (logits, labels, number)),
        (OPS.soft_cross_entropy_backward.default, (grad.clone().requires_grad_(), logits, labels, number)),
        (OPS.soft_cross_entropy_jvp.default, (logits, labels, logits_t, labels_t, number)),
        (OPS.soft_cross_entropy_backward_jvp.default, (grad, grad, *still, number)),
    ]


# tiles of 32 to 512 classes, and rows of several
SIZES = [(3, 5), (2, 1), (2, 33), (1, 515), (0, 4)]
CASES = [Case(f"{kind} {N}x{K}", *rows(N, K, kind)) for N, K in SIZES for kind in KINDS]
CASES += [Case(f"{kind} {how}", *rows(3, 7, kind, how)) for kind in KINDS for how in ("slice", "transposed")]


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("repeats", "opcheck")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case: Case, check: str) -> None:
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("kind", KINDS)
def test_registrations(kind: str) -> None:
    check_op(ours, plain, [Case(kind, *rows(3, 5, kind))], raw_calls=raw_calls, checks=["opcheck"])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes_take_no_part(kind: str) -> None:
    """But for the label of a row."""
    make, options = rows(3, 5, kind)
    logits, *soft = make(torch.float64)
    filler = {"logits": -torch.inf, "probs": 0.0}.get(kind)
    padded = [torch.cat([logits, torch.full((3, 2), -torch.inf).double()], 1)]
    padded += [torch.cat([labels, torch.full((3, 2), filler).double()], 1) for labels in soft]
    leaves, more = [t.requires_grad_() for t in (logits, *soft)], [t.requires_grad_() for t in padded]
    want, got = plain(*leaves, **options), ours(*more, **options)
    torch.testing.assert_close(got, want)
    first, padded_first = (
        torch.autograd.grad(loss.sum(), x, create_graph=True) for loss, x in ((want, leaves), (got, more))
    )
    second, padded_second = (
        torch.autograd.grad(sum((g[:, :5] ** 2).sum() for g in grads), x)
        for grads, x in ((first, leaves), (padded_first, more))
    )
    for a, b in zip((*padded_first, *padded_second), (*first, *second), strict=True):
        torch.testing.assert_close(a[:, :5], b)
        assert (a[:, 5:] == 0).all()


def test_nan_and_class_numbers_out_of_range_stay_in_their_rows() -> None:
    for kind in KINDS:
        make, options = rows(3, 5, kind)
        logits, *soft = make(torch.float32)
        logits[1, 2] = torch.nan
        x = logits.requires_grad_()
        loss = ours(x, *soft, **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [False, True, False]
    x = torch.randn(3, 4, requires_grad=True)
    loss = OPS.soft_cross_entropy(x, torch.tensor([-1, 2, 4]), 0)
    assert loss.isnan().tolist() == [True, False, True]
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().all(1).tolist() == [True, False, True]


def test_far_apart_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [100.0, 10.0, 0.0], [-300.0, -400.0, -388.0], [0.0, 95.0, 0.0]])
    for kind, labels in (("hard", torch.tensor([1, 2, 0, 1])), ("logits", 50 * logits.flip(0))):
        want = reference.soft_cross_entropy(logits.double(), labels, kind, "none")
        got = soft_cross_entropy(logits, labels, label_kind=kind, reduction="none", backend="triton")
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("form", kernels.FORMS)
def test_nothing_is_written_outside(form: str) -> None:
    """Outputs amid guard cells."""
    N, K = 3, 37
    logits, labels, logits_t, labels_t = (torch.randn(N, K) for _ in range(4))
    grad = torch.randn(N)

    def guarded(*shape: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((torch.Size(shape).numel() + 256,), 7.0)
        memory[128:-128] = torch.nan
        return memory, memory[128:-128].view(shape)

    held = {"loss": guarded(N), "grad_logits": guarded(N, K), "grad_labels": guarded(N, K)}
    if form in ("forward", "jvp"):
        held = {"loss": held["loss"]}
    elif form == "backward":
        held.pop("loss")
    views = tuple(view for _, view in held.values())
    given = (grad,) if form == "backward" else (grad, grad) if form == "backward_jvp" else ()
    direction = (logits_t, labels_t) if "jvp" in form else ()
    getattr(kernels, form)(views if len(views) > 1 else views[0], *given, logits, labels, *direction, 1)
    for memory, view in held.values():
        assert view.isfinite().all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()
