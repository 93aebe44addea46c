"""The CUDA kernels of multi_crop, run on the host machine, against plain torch."""

from __future__ import annotations

import mmap

import pytest
import torch
from host_machine import SCALARS, HostMachine
from torch import Tensor

from pydistill.ops.multi_crop import COLUMNS
from pydistill.reference import multi_crop as reference

# images and results; three channels at a time, 256 threads a block
SHAPES = [
    ((3, 3, 17, 16), (4, 11, 13)),
    ((2, 1, 9, 7), (3, 20, 21)),
    ((2, 7, 21, 25), (2, 3, 4)),
    ((1, 2, 1, 1), (2, 2, 3)),
]
# each rounding of a result is within eps / 2; those before it are float32's (float64's)
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def record_of(rows: int, images: int, size: tuple[int, int], out_size: tuple[int, int], parts: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(rows + parts)
    (H, W), (h, w) = size, out_size

    def integers(low: int, high: Tensor | int) -> Tensor:  # both included
        return low + (torch.rand(rows, parts, generator=random) * (high - low + 1)).floor()

    height, width, to_top, to_left = integers(1, H), integers(1, W), integers(0, h - 1), integers(0, w - 1)
    drawn = {
        **{"source": integers(0, images - 1), "height": height, "width": width, "flip": integers(0, 1)},
        **{"top": integers(0, H - height), "left": integers(0, W - width), "fit": integers(0, 1)},
        **{
            "roll_y": integers(-30, 30),
            "roll_x": integers(-30, 30),
            "alpha": torch.rand(rows, parts, generator=random),
        },
        **{
            "to_top": to_top,
            "to_left": to_left,
            "to_height": integers(0, h - to_top),
            "to_width": integers(0, w - to_left),
        },
    }
    for name, value in {"fit": 0, "to_top": 0, "to_left": 0, "to_height": h, "to_width": w, "alpha": 1}.items():
        drawn[name][:, 0] = value
    return torch.stack([drawn[c] for c in COLUMNS], 2)


def norm_of(C: int) -> Tensor:
    return torch.stack([0.1 * torch.arange(C, dtype=torch.float64), 0.5 + 0.1 * torch.arange(C, dtype=torch.float64)])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def run(host: HostMachine, form: str, source: Tensor, rows: int, record: Tensor, sizes: tuple, **options) -> Tensor:
    """The result, which ends in an image that must stay as it was."""
    side = sizes[5:] if form == "forward" else sizes[2:4]
    result = torch.full((rows + 1, sizes[1], *side), -77.0, dtype=source.dtype)
    host.multi_crop(form, source=source, result=result, record=record, sizes=sizes, **options)
    assert (result[rows:] == -77).all(), "the kernel wrote outside of its output"
    return result[:rows]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    scale = want.abs().max()
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * scale, f"off by {error:.2e} of {scale:.2e}"
    assert not ((got == 0) & (want.abs() > TOLERANCE[dtype] * scale)).any(), "lost values"


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", SCALARS, ids=str)
def test_against_plain_torch(host: HostMachine, dtype: torch.dtype, parts: int) -> None:
    for shape, (B, *out_size) in SHAPES:
        record, norm = record_of(B, shape[0], shape[2:], tuple(out_size), parts), norm_of(shape[1])
        images, base = normal(*shape, dtype=dtype), normal(1, *shape[1:], dtype=dtype)
        sizes = (*shape, B, *out_size)
        leaves = [t.double().requires_grad_() for t in (images, base)]
        want = reference(leaves[0], record, tuple(out_size), leaves[1], *norm)
        got, again = (run(host, "forward", images, B, record, sizes, base=base, norm=norm, seed=s) for s in (1, 2))
        assert_close(got, want.detach(), dtype)
        assert torch.equal(got, again), "the order shows"
        grad = normal(B, shape[1], *out_size, dtype=dtype)
        gradients = torch.autograd.grad(want, leaves, grad.double())
        for shared, truth in zip((False, True), gradients, strict=True):
            options = {"norm": norm, "shared": shared}
            got, again = (run(host, "backward", grad, len(truth), record, sizes, seed=s, **options) for s in (1, 2))
            assert_close(got, truth, dtype)
            assert torch.equal(got, again), "the order shows"


def test_crops_that_are_not_resized_are_bitwise(host: HostMachine) -> None:
    for dtype, size in ((torch.float32, 41), (torch.float64, 49)):  # of which the product with the inverse is not one
        images, whole = (
            normal(1, 1, size, 2, dtype=dtype),
            {"height": size, "width": 2, "to_height": size, "to_width": 2},
        )
        record = torch.tensor([[[float((whole | {"alpha": 1}).get(column, 0)) for column in COLUMNS]]])
        assert torch.equal(run(host, "forward", images, 1, record, (1, 1, size, 2, 1, size, 2)), images)


def test_linear_leaves_the_mean_out(host: HostMachine) -> None:
    images, record, norm = normal(2, 3, 8, 8), record_of(2, 2, (8, 8), (6, 6)), norm_of(3)
    sizes = (2, 3, 8, 8, 2, 6, 6)
    linear = run(host, "forward", images, 2, record, sizes, norm=norm, linear=True)
    assert torch.equal(linear, run(host, "forward", images, 2, record, sizes, norm=norm * torch.tensor([[0.0], [1.0]])))
    assert not torch.equal(linear, run(host, "forward", images, 2, record, sizes, norm=norm))


def test_strides(host: HostMachine) -> None:
    """A slice of something larger with NaN in between, channels-last, one row of the record for all."""
    dense, base = normal(3, 3, 7, 8), normal(1, 3, 7, 8)
    record = record_of(1, 3, (7, 8), (6, 5), 2).expand(3, -1, -1)

    def within(tensor: Tensor) -> Tensor:
        wide = torch.full([2 * size + 1 for size in tensor.shape], float("nan"))
        return wide[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)

    sizes = (3, 3, 7, 8, 3, 6, 5)
    want = run(host, "forward", dense, 3, record.contiguous(), sizes, base=base)
    for arranged in (within(dense), dense.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(run(host, "forward", arranged, 3, record, sizes, base=within(base)), want)
    assert torch.equal(run(host, "forward", dense, 3, within(record), sizes, base=base), want)


@pytest.mark.parametrize("column", [c for c in COLUMNS if c != "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6, 1e8, 1e12])
def test_parts_that_do_not_fit(host: HostMachine, column: str, value: float) -> None:
    images, record = normal(2, 3, 8, 8), record_of(3, 2, (8, 8), (6, 6), 2)
    record[1, 1, COLUMNS.index(column)] = value
    leaf = images.clone().requires_grad_()
    want = reference(leaf, record, (6, 6))
    sizes = (2, 3, 8, 8, 3, 6, 6)
    torch.testing.assert_close(run(host, "forward", images, 3, record, sizes), want.detach(), equal_nan=True)
    grad = normal(3, 3, 6, 6)
    (truth,) = torch.autograd.grad(want, leaf, grad)
    torch.testing.assert_close(run(host, "backward", grad, 2, record, sizes), truth)


def test_nothing_to_do(host: HostMachine) -> None:
    record = record_of(0, 1, (4, 4), (3, 3))
    run(host, "forward", normal(2, 3, 4, 4), 0, record, (2, 3, 4, 4, 0, 3, 3))
    assert (run(host, "backward", normal(0, 3, 3, 3), 2, record, (2, 3, 4, 4, 0, 3, 3)) == 0).all()


def test_offsets_beyond_32_bits(host: HostMachine) -> None:
    """Two images 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 5
    memory = mmap.mmap(-1, 2 * (far + 1000), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    dense, record = normal(2, 3, 4, 5, dtype=torch.bfloat16), record_of(3, 2, (4, 5), (3, 3))
    images = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    images.copy_(dense)
    sizes = (2, 3, 4, 5, 3, 3, 3)
    assert torch.equal(run(host, "forward", images, 3, record, sizes), run(host, "forward", dense, 3, record, sizes))
    del images
