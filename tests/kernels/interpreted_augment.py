"""The Triton kernels of augment in Triton's interpreter, against plain torch.

Not collected by itself: `test_augment_triton.py` runs this file in a process of its own, because the interpreter has to
be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pydistill.ops import augment_images
from pydistill.ops.augment import COLUMNS, IDENTITY
from pydistill.testing import Case, check_op
from pydistill.triton import augment as kernels
from tests.ops.test_augment import GROUPS, case, plain, raw_calls, record_of


def ours(images: Tensor, *, record: Tensor, **options) -> Tensor:
    return augment_images(images, record, backend="triton", **options)


def calls(images: Tensor, **options) -> list:
    """`raw_calls` of the other library."""
    found = [
        (getattr(torch.ops.pydistill_triton, op._opname).default, args) for op, args in raw_calls(images, **options)
    ]
    return found[-2:]


# tiles of 32 to 512 pixels
WHOLE = [case("3 channels", (2, 3, 6, 5)), case("one", (1, 1, 8, 7)), case("5 channels", (1, 5, 4, 6))]
WHOLE += [case("flip_batch", (1, 3, 5, 6), flip_batch=True), case("none", (0, 3, 4, 4))]
WHOLE += [case("other corners", (1, 3, 4, 6), align_corners=False)]
WHOLE += [case(layout, (2, 3, 4, 5), layout=layout) for layout in ("channels_last", "slice", "expanded")]
PARTS = [case(name, (2, 3, 5, 6), (name,)) for name in GROUPS]
PARTS += [case("scale and rotate", (1, 3, 6, 5), ("scale", "rotate")), case("nothing", (1, 3, 4, 5), ())]


@pytest.mark.parametrize("case", WHOLE + PARTS, ids=lambda case: case.name)
def test_against_plain_torch(case: Case) -> None:
    """With gradients and theirs: numerical derivatives would take hours in the interpreter."""
    check_op(ours, plain, [case], checks=["values"])


@pytest.mark.parametrize("check", ["func", "nan"])
def test_transforms_and_nan(check: str) -> None:
    check_op(ours, plain, [case("small", (2, 1, 2, 3))], checks=[check])


def test_registrations() -> None:
    check_op(ours, plain, [case("flip_batch", (1, 3, 4, 5), flip_batch=True)], raw_calls=calls, checks=["opcheck"])


@pytest.mark.parametrize("shape", [(1, 3, 1, 7), (1, 3, 7, 1), (1, 1, 1, 1), (1, 2, 2, 2)])
def test_images_of_one_row_or_column(shape: tuple[int, ...]) -> None:
    for align_corners in (True, False):
        check_op(ours, plain, [case("thin", shape, align_corners=align_corners)], checks=["values"])


def test_several_tiles() -> None:
    check_op(ours, plain, [replace(case("13x11", (1, 2, 13, 11)), dtypes=(torch.float32,))], checks=["values"])


def test_an_identity_changes_nothing() -> None:
    images = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    record = torch.tensor([list(IDENTITY.values())] * 2)
    assert torch.equal(ours(images, record=record), images)


@pytest.mark.parametrize("scale", [0.0, 1e-8, -0.8, 0.05, 30.0])
def test_extreme_scales_and_angles(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 5, 6, generator=generator, dtype=torch.float64)
    record = record_of(3, 5, 6)
    record[:, COLUMNS.index("scale_x")] = scale
    record[1, COLUMNS.index("scale_y")] = scale
    record[:, COLUMNS.index("angle")] = torch.tensor([1.5707963, -2.5, 3.1])
    found = []
    for function in (ours, plain):
        leaf = x.clone().requires_grad_()
        out = function(leaf, record=record)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_record_that_is_not_finite_makes_its_image_nan() -> None:
    for value in (torch.nan, torch.inf):
        record = record_of(2, 4, 5)
        record[1, COLUMNS.index("scale_y")] = value
        x = torch.randn(2, 3, 4, 5).requires_grad_()
        out = ours(x, record=record)
        (grad,) = torch.autograd.grad(out.sum(), x)
        for image in (out, grad):
            assert image[0].isfinite().all()
            assert image[1].isnan().all()


def test_nothing_is_written_outside() -> None:
    memory = torch.full((256 + 90,), 7.0)
    memory[128:-128] = torch.nan
    results, x = memory[128:-128].view(1, 3, 5, 6), torch.randn(1, 3, 5, 6)
    for call in (
        lambda: kernels.forward(results, x, record_of(1, 5, 6), False, True, False),
        lambda: kernels.backward(results, x, record_of(1, 5, 6), False, True),
    ):
        memory[128:-128] = torch.nan
        call()
        assert results.isfinite().all()
        assert (memory[:128] == 7).all()
        assert (memory[-128:] == 7).all()
