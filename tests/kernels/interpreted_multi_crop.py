"""The Triton kernels of multi_crop in Triton's interpreter, against plain torch.

Not collected by itself: `test_multi_crop_triton.py` runs this file in a process of its own, because the interpreter has
to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pydistill.ops import multi_crop
from pydistill.ops.multi_crop import COLUMNS
from pydistill.testing import Case, check_op
from pydistill.triton import multi_crop as kernels
from tests.ops.test_multi_crop import BAD_PARTS, case, plain, raw_calls, record_of


def ours(images: Tensor, base: Tensor | None = None, *, record: Tensor, **options) -> Tensor:
    return multi_crop(images, record, base=base, backend="triton", **options)


def calls(*tensors: Tensor, **options) -> list:
    """`raw_calls` of the other library."""
    found = raw_calls(*tensors, **options)
    return [(getattr(torch.ops.pydistill_triton, op._opname).default, args) for op, args in found]


# tiles of 16 to 256 pixels, up to 16 channels at a time
CASES = [
    case("one part", (2, 3, 6, 5), (4, 5), rows=2),
    case("larger", (1, 3, 3, 2), (7, 4), rows=1, norm=True),
    case("smaller", (2, 1, 12, 17), (2, 3), rows=2),
    case("mixed", (2, 3, 6, 5), (5, 4), rows=2, parts=2, base=True, norm=True),
    case("four parts", (2, 2, 5, 6), (6, 5), rows=1, parts=4),
    case("base", (1, 17, 3, 4), (4, 3), rows=1, base=True),
    case("one pixel", (2, 2, 1, 1), (1, 1)),
    case("no record", (2, 3, 4, 4), (3, 3), rows=0, base=True),
    *(case(layout, (2, 3, 5, 4), (4, 4), rows=1, layout=layout) for layout in ("channels_last", "slice", "expanded")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_plain_torch(case: Case) -> None:
    """With gradients and theirs: numerical derivatives would take hours in the interpreter."""
    check_op(ours, plain, [case], checks=["values"])


def test_transforms() -> None:
    check_op(ours, plain, [case("small", (2, 1, 2, 2), (2, 2), rows=1, parts=2, base=True)], checks=["func"])


def test_nan() -> None:
    boxes = {"top": 1, "left": 0, "height": 3, "width": 2}  # no filter has a tap of weight zero
    check_op(ours, plain, [case("nan", (2, 1, 4, 3), (3, 4), parts=2, norm=True, **boxes)], checks=["nan"])


@pytest.mark.parametrize("base", [False, True])
def test_registrations(base: bool) -> None:
    check_op(ours, plain, [case("small", (2, 1, 3, 2), (2, 3), 1, base=base)], raw_calls=calls, checks=["opcheck"])


def test_several_tiles() -> None:
    """Some of which a part does not reach."""
    large = case("15x14", (1, 3, 15, 14), (13, 11), rows=1, parts=2, norm=True)
    check_op(ours, plain, [replace(large, dtypes=(torch.float32,), order=1)], checks=["values"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crops_that_are_not_resized_are_bitwise(dtype: torch.dtype) -> None:
    """Also at sizes of which the product with the inverse is not one."""
    for size in (8, 41, 49):
        images = torch.randn(1, 1, size, 2, dtype=dtype)
        record = record_of(1, 1, (size, 2), (size, 2), flip=1, roll_y=3, roll_x=-1, top=0, left=0, height=size, width=2)
        assert torch.equal(ours(images, record=record, out_size=(size, 2)), images.flip(3).roll((3, -1), (2, 3)))


@pytest.mark.parametrize(("column", "value"), BAD_PARTS)
def test_a_part_that_does_not_fit_makes_its_result_nan(column: str, value: float) -> None:
    images, base = torch.randn(3, 1, 8, 8, requires_grad=True), torch.zeros(1, 1, 8, 8, requires_grad=True)
    record = record_of(2, 3, (8, 8), (6, 6), parts=2, top=1, height=7)
    record[1, 1, COLUMNS.index(column)] = value
    found = []
    for function in (ours, plain):
        out = function(images, base, record=record, out_size=6)
        found.append((out, *torch.autograd.grad(out, (images, base), torch.ones_like(out))))
    assert found[0][0][1].isnan().all()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_nothing_is_written_outside() -> None:
    memory = torch.full((256 + 90,), 7.0)
    results, x, record = memory[128:-128].view(1, 3, 5, 6), torch.randn(1, 3, 5, 6), record_of(1, 1, (5, 6), (5, 6))
    for call in (
        lambda: kernels.forward(results, x, None, record, None, 5, 6, False),
        lambda: kernels.backward((results, results), x, record, None, 1, 5, 6, True, False),
        lambda: kernels.backward((results, results), x, record, None, 1, 5, 6, False, True),
    ):
        memory[128:-128] = torch.nan
        call()
        assert results.isfinite().all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()
