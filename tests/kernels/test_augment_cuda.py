"""The CUDA kernels of augment, run on the host machine, against plain torch."""

from __future__ import annotations

import mmap

import pytest
import torch
from host_machine import SCALARS, HostMachine
from torch import Tensor

from pydistill.ops.augment import COLUMNS, IDENTITY
from pydistill.reference import augment_images as reference

# three channels at a time, 256 threads a block
SHAPES = [(2, 3, 17, 16), (1, 1, 28, 28), (2, 4, 5, 7), (1, 7, 6, 3), (2, 2, 1, 9), (2, 2, 9, 1)]
# each rounding of a result is within eps / 2; those before it are float32's (float64's), at coordinates in pixels
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}
OPERATIONS = {
    "everything": (),
    "no resampling": ("scale_x", "scale_y", "angle"),
    "no scale": ("scale_x", "scale_y"),
    "no rotation": ("angle",),
    "no colour": ("brightness", "saturation", "contrast"),
}


def record_of(rows: int, H: int, W: int, idle: tuple[str, ...] = ()) -> Tensor:
    random = torch.Generator().manual_seed(rows)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=random)

    drawn = {
        **{"brightness": uniform(-0.5, 0.5), "saturation": uniform(0, 2), "contrast": uniform(0.5, 1.5)},
        **{"crop_y": uniform(-2, 2).round(), "crop_x": uniform(-2, 2).round(), "flip": uniform(0, 1).round()},
        **{"cutout_top": uniform(-2, H / 2).round(), "cutout_left": uniform(-2, W / 2).round()},
        **{"cutout_height": torch.full((rows,), (H + 1) // 2), "cutout_width": torch.full((rows,), (W + 1) // 2)},
        **{"scale_x": uniform(0.5, 1.5), "scale_y": uniform(0.5, 1.5), "angle": uniform(-1, 1)},
    }
    columns = [torch.full((rows,), IDENTITY[c]) if c in idle else drawn[c] for c in COLUMNS]
    return torch.stack(columns, 1).float()


def truth(form: str, source: Tensor, record: Tensor, flip_batch: bool, align_corners: bool) -> Tensor:
    def forward(images: Tensor) -> Tensor:
        return reference(images, record, flip_batch, align_corners)

    if form == "forward":
        return forward(source.double())
    images = source.double()[: len(source) // (2 if flip_batch else 1)]
    return torch.func.vjp(forward, images)[1](source.double())[0]


def run(host: HostMachine, form: str, source: Tensor, record: Tensor, flip_batch: bool = False, **options) -> Tensor:
    """The result, which ends in an image that must stay as it was."""
    rows = len(record) if form == "forward" else len(source) // (2 if flip_batch else 1)
    result = torch.full((rows + 1, *source.shape[1:]), -77.0, dtype=source.dtype)
    host.augment(form, source=source, result=result, record=record, flip_batch=flip_batch, **options)
    assert (result[rows:] == -77).all(), "the kernel wrote outside of its output"
    return result[:rows]


def images_of(rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, *shape[1:], generator=torch.Generator().manual_seed(rows)).to(dtype)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    scale = want.abs().max()
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * scale, f"off by {error:.2e} of {scale:.2e}"
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm().clamp(min=scale), "off in L2"
    assert not ((got == 0) & (want.abs() > TOLERANCE[dtype] * scale)).any(), "lost values"


@pytest.mark.parametrize("form", ["forward", "backward"])
@pytest.mark.parametrize("flip_batch", [False, True])
@pytest.mark.parametrize("dtype", SCALARS, ids=str)
def test_against_plain_torch(host: HostMachine, dtype: torch.dtype, flip_batch: bool, form: str) -> None:
    for shape in SHAPES:
        for align_corners in (True, False):
            record = record_of(shape[0] * (2 if flip_batch else 1), *shape[2:])
            source = images_of(shape[0] if form == "forward" else len(record), shape, dtype)
            got, again = (
                run(host, form, source, record, flip_batch, align_corners=align_corners, seed=s) for s in (1, 2)
            )
            assert_close(got, truth(form, source, record, flip_batch, align_corners), dtype)
            assert torch.equal(got, again), "the order shows"


@pytest.mark.parametrize("form", ["forward", "backward"])
@pytest.mark.parametrize("idle", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operations_left_out(host: HostMachine, idle: tuple[str, ...], form: str) -> None:
    shape = (3, 3, 9, 8)
    record, source = record_of(3, 9, 8, idle), images_of(3, shape, torch.float64)
    assert_close(run(host, form, source, record), truth(form, source, record, False, True), torch.float64)


def test_far_parameters(host: HostMachine) -> None:
    """Scales that shrink to a point, mirror and enlarge, angles beyond a quarter turn, crops of nothing."""
    far = {"scale_x": (0.0, -1.0, 9.0, 0.01), "scale_y": (-0.5, 1e-9), "angle": (3.1415927, 1.5707964, -2.5)}
    far |= {"crop_x": (30.0, -30.0), "cutout_height": (0.0, 99.0)}
    for column, values in far.items():
        for value in values:
            record = record_of(1, 9, 8)
            record[:, COLUMNS.index(column)] = value
            for form in ("forward", "backward"):
                source = images_of(1, (1, 3, 9, 8), torch.float64)
                want = truth(form, source, record, False, True)
                torch.testing.assert_close(run(host, form, source, record), want, rtol=0, atol=1e-10)


def test_identity_is_bitwise(host: HostMachine) -> None:
    record = torch.tensor(list(IDENTITY.values())).expand(2, -1)
    for dtype in SCALARS:
        source = images_of(2, (2, 4, 5, 6), dtype)
        for form in ("forward", "backward"):
            assert torch.equal(run(host, form, source, record), source)


def test_linear_leaves_the_brightness_out(host: HostMachine) -> None:
    source, record = images_of(2, (2, 3, 8, 8)), record_of(2, 8, 8)
    without = record.clone()
    without[:, COLUMNS.index("brightness")] = 0
    linear = run(host, "forward", source, record, linear=True)
    assert torch.equal(linear, run(host, "forward", source, without))
    assert not torch.equal(linear, run(host, "forward", source, record))


def test_strides(host: HostMachine) -> None:
    """A slice of something larger with NaN in between, channels-last, one row of the record for all."""
    dense, record = images_of(3, (3, 3, 7, 8)), record_of(1, 7, 8).expand(3, -1)
    wide = torch.full([2 * size + 1 for size in dense.shape], float("nan"))[(slice(1, None, 2),) * 4].copy_(dense)
    for form in ("forward", "backward"):
        want = run(host, form, dense, record.contiguous())
        for arranged in (wide, dense.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(run(host, form, arranged, record), want)
        sparse = torch.full((3, 26), float("nan"))[:, ::2].copy_(record)
        assert torch.equal(run(host, form, dense, sparse), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf(host: HostMachine, bad: float) -> None:
    """As in the definition; a non-finite scale or angle spoils its own image only."""
    source, record = images_of(3, (3, 3, 8, 8)), record_of(3, 8, 8)
    source[1, 2, 4, 4] = bad
    want = reference(source, record).isnan()
    assert want.any()
    assert torch.equal(run(host, "forward", source, record).isnan(), want)
    for column in ("scale_x", "scale_y", "angle"):
        record = record_of(3, 8, 8)
        record[1, COLUMNS.index(column)] = bad
        for form in ("forward", "backward"):
            got = run(host, form, images_of(3, (3, 3, 8, 8)), record)
            assert got[1].isnan().all()
            assert got[[0, 2]].isfinite().all()


def test_no_images(host: HostMachine) -> None:
    for form in ("forward", "backward"):
        run(host, form, images_of(0, (0, 3, 4, 4)), record_of(0, 4, 4))


def test_offsets_beyond_32_bits(host: HostMachine) -> None:
    """Two images 2^31 elements apart, in memory that is never touched in between."""
    far = 2**31 + 5
    memory = mmap.mmap(-1, 2 * (far + 1000), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    dense, record = images_of(2, (2, 3, 4, 5), torch.bfloat16), record_of(2, 4, 5)
    images = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    images.copy_(dense)
    assert torch.equal(run(host, "forward", images, record), run(host, "forward", dense, record))
    del images
