"""The Triton kernel of row_products in Triton's interpreter, against plain torch.

Not collected by itself: `test_row_products_triton.py` runs this file in a process of its own, because the interpreter
has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops import row_products
from pydistill.testing import CHECKS, Case, check_op
from pydistill.triton import row_products as kernels

OPS = torch.ops.pydistill_triton


def ours(a: Tensor, b: Tensor, rows: list) -> Tensor:
    return row_products(a, b, rows, backend="triton").to(a.dtype)


def plain(a: Tensor, b: Tensor, rows: list) -> Tensor:
    return reference.row_products(a, b, rows).to(a.dtype)


def raw_calls(a: Tensor, b: Tensor, rows: list) -> list:
    flat = [number for block in rows for number in block]
    grad = torch.randn(len(a), sum(flat[1::3]), 4, dtype=a.dtype, requires_grad=True)
    a_t, b_t = torch.randn_like(a, requires_grad=True), torch.randn_like(b, requires_grad=True)
    return [
        (OPS.row_products.default, (a, b, flat)),
        (OPS.row_products_backward.default, (grad, a, b, flat)),
        (OPS.row_products_jvp.default, (a, b, a_t, b_t, flat)),
    ]


def vectors(K: int, P: int, layout: str = "dense"):
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(K * P)
        a, b = torch.randn(2, K, P, generator=generator, dtype=torch.float64)
        pair = [t.to(dtype) for t in (a, a + 0.3 * b)]
        if layout == "columns":
            pair = [t.t().contiguous().t() for t in pair]
        if layout == "expanded":
            pair = [t[:1].expand(K, P) for t in pair]
        return tuple(pair)

    return make


CASES = [
    Case("convnet", vectors(2, 75), {"rows": [(2, 4, 9), (40, 3, 10), (71, 1, 4)]}),
    Case("empty blocks", vectors(2, 5), {"rows": [(1, 0, 3), (2, 1, 3)]}),
    Case("no vectors", vectors(0, 6), {"rows": [(0, 2, 3)]}),
    *(Case(kind, vectors(2, 12, kind), {"rows": [(1, 2, 5)]}) for kind in ("columns", "expanded")),
]
# tiles of 32 to 512 elements, and rows of several
LENGTHS = (1, 31, 33, 511, 512, 513, 1030)


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "repeats"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case: Case, check: str) -> None:
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


@pytest.mark.parametrize("length", LENGTHS)
def test_partial_tiles(length: int) -> None:
    check_op(ours, plain, [Case("row", vectors(1, length + 1), {"rows": [(1, 1, length)]})], checks=["values", "nan"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", kernels.FORMS)
def test_nothing_is_written_outside(form: str, dtype: torch.dtype) -> None:
    """Outputs amid guard cells; elements between rows become zeros in gradients, whatever was there."""
    rows, K, P, R = [3, 2, 7, 20, 1, 33], 2, 60, 3
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, a_t, b_t = (torch.randn(K, P).to(dtype) for _ in range(4))

    def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.full((like.numel() + 256,), 7.0, dtype=like.dtype)
        memory[128:-128] = torch.nan
        return memory, memory[128:-128].view(like.shape)

    grad = torch.randn(K, R, 4).to(compute)
    if form == "backward":
        held = [guarded(t) for t in (a, b)]
        kernels.backward(tuple(view for _, view in held), grad, a, b, rows)
        expected = OPS.row_products_backward(grad, a, b, rows)
    else:
        held = [guarded(grad)]
        vectors_in = (a, b) if form == "forward" else (a, b, a_t, b_t)
        getattr(kernels, form)(held[0][1], *vectors_in, rows)
        expected = [getattr(OPS, "row_products" if form == "forward" else "row_products_jvp")(*vectors_in, rows)]
    for (memory, view), truth in zip(held, expected, strict=True):
        assert torch.equal(view, truth)
        assert torch.isfinite(view.float()).all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()
    if form == "backward":
        assert not held[0][1][:, [0, 1, 2, 17, 18, 19, 53, 59]].any()
