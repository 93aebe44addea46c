"""The Triton kernel of sparse_label_loss in Triton's interpreter, against plain torch.

Not collected by itself: `test_kd_divergence_triton.py` runs this file in a process of its own, because the interpreter
has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops import sparse_label_loss
from pydistill.ops.sparse_label_loss import TAILS
from pydistill.testing import assert_close
from pydistill.triton import sparse_label_loss as kernels
from tests.divergence.edges import ROWS, TEMPERATURES, check_sparse

OPS = torch.ops.pydistill_triton


def problem(N: int, C: int, k: int, codes: bool = False) -> tuple[Tensor, Tensor, Tensor, float | None]:
    generator = torch.Generator().manual_seed(N * C + k)
    logits = 2 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    indices = torch.rand(N, C, generator=generator).argsort(1)[:, :k]
    if codes:
        return logits, indices, torch.randint(20, 256, (N, k), generator=generator, dtype=torch.uint8), 0.0625
    values = torch.randint(0, max(2, 100 // k), (N, k), generator=generator).double() / 128
    values[:, 0] = 1 / 128
    return logits, indices, values, None


def values_of(function, logits, indices, values, dtype, **options) -> dict[str, Tensor]:
    """Loss, and the gradient as kept and as recomputed."""
    x = logits.to(dtype).requires_grad_()
    loss = function(x, indices, values, **options)
    weights = torch.linspace(0.5, 2, max(1, loss.numel()), dtype=torch.float64).to(dtype).reshape(loss.shape)
    kept = torch.autograd.grad(loss, x, weights, retain_graph=True)[0].clone()
    return {"loss": loss, "kept": kept, "gradient": torch.autograd.grad(loss, x, weights)[0]}


def compare(logits, indices, values, step, dtype, **options) -> None:
    options = {"step": step, "T": 2.0, "reduction": "none", **options}
    truth = values_of(reference.sparse_label_loss, logits.to(dtype).double(), indices, values, torch.float64, **options)
    plain = values_of(reference.sparse_label_loss, logits, indices, values, dtype, **options)
    found = values_of(sparse_label_loss, logits, indices, values, dtype, backend="triton", **options)
    for name, value in found.items():
        assert value.dtype == dtype
        rtol = max(1e-5, 16 * torch.finfo(dtype).eps)
        assert_close(name, value, truth[name], plain[name], rtol=rtol)


@pytest.mark.parametrize("T", TEMPERATURES)
def test_at_the_edges(T: float) -> None:
    for edge in ROWS:
        check_sparse(
            lambda *args, **options: sparse_label_loss(*args, backend="triton", **options), edge, T, torch.float32
        )


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("codes", [False, True], ids=["values", "codes"])
def test_against_plain_torch(codes: bool, tail: str, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare(*problem(3, 37, 5, codes), dtype, tail=tail, kind=kind)


# tiles of 32 to 512 classes, and rows of several
@pytest.mark.parametrize(("C", "k"), [(1, 1), (32, 32), (33, 1), (512, 3), (513, 4), (1030, 2)])
def test_partial_tiles(C: int, k: int) -> None:
    compare(*problem(2, C, k), torch.float32)


def test_layouts_and_reductions() -> None:
    logits, indices, values, step = problem(5, 40, 4)
    for layout in (lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(x.shape)):
        compare(layout(logits), layout(indices), layout(values), step, torch.float32)
    for reduction in ("batchmean", "sum"):
        compare(logits, indices, values, step, torch.float32, reduction=reduction, scale_T2=True)


def test_rows_of_no_distribution_are_nan_and_alone_in_that() -> None:
    logits = torch.randn(4, 6)
    logits[1, 0] = torch.nan
    logits.requires_grad_()
    indices = torch.tensor([[0, 6], [1, 2], [5, 3], [4, 4]])
    loss = OPS.sparse_label_loss(logits, indices, torch.full((4, 2), 0.25), 1.0, 0, 0.0, True, 1.0, True)[0]
    assert loss.isnan().tolist() == [True, True, False, True]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.isnan().all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("form", ["forward", "backward"])
def test_nothing_is_written_outside(form: str) -> None:
    """Outputs amid guard cells."""
    logits, indices, values, _ = problem(3, 37, 5)
    inputs, options = (logits.float(), indices, values.float()), (2.0, 0, 0.0, True, 4.0)

    def guarded(*shape: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((torch.Size(shape).numel() + 256,), 7.0)
        memory[128:-128] = torch.nan
        return memory, memory[128:-128].view(shape)

    held = [guarded(3), guarded(3, 37)]
    if form == "forward":
        kernels.forward((held[0][1], held[1][1]), *inputs, *options, True)
    else:
        held = held[1:]
        kernels.backward(held[0][1], torch.randn(3), *inputs, *options)
    for memory, view in held:
        assert view.isfinite().all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()


def test_registrations() -> None:
    logits, indices, values, _ = problem(3, 7, 2)
    inputs, options = (indices, values.float()), (2.0, 0, 0.0, True, 4.0)
    torch.library.opcheck(OPS.sparse_label_loss.default, (logits.float().requires_grad_(), *inputs, *options, True))
    torch.library.opcheck(OPS.sparse_label_loss_backward.default, (torch.randn(3), logits.float(), *inputs, *options))


def test_no_float64() -> None:
    with pytest.raises(NotImplementedError, match="sparse_label_loss: backend='triton' has no kernel for float64"):
        sparse_label_loss(*problem(2, 4, 1)[:3], backend="triton")
