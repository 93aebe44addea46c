"""Crops of a batch against their definition: a table of cases under `check_op`, and the messages."""

import pytest
import torch

from pydistill import reference
from pydistill.ops import multi_crop
from pydistill.ops.multi_crop import COLUMNS
from pydistill.testing import CHECKS, Case, check_op
from tests.ops.layouts import laid_out

OPS = torch.ops.pydistill


def record_of(rows, images, size, out_size, parts=1, seed=0, **fixed):
    """Boxes, flips and rolls of any kind; with several parts, all but the first in their own places."""
    generator = torch.Generator().manual_seed(seed)
    (H, W), (h, w) = size, out_size

    def integers(low, high):  # tensors or numbers, both included
        span = torch.as_tensor(high - low + 1)
        return low + (torch.rand(rows, parts, generator=generator) * span).floor()

    height, width = integers(1, H), integers(1, W)
    to_top, to_left = integers(0, h - 1), integers(0, w - 1)
    drawn = {
        **{"source": integers(0, images - 1), "height": height, "width": width},
        **{"top": integers(0, H - height), "left": integers(0, W - width)},
        **{"flip": integers(0, 1), "roll_y": integers(-2 * h, 2 * h), "roll_x": integers(-2 * w, 2 * w)},
        **{"fit": integers(0, 1), "to_top": to_top, "to_left": to_left},
        **{"to_height": integers(1, h - to_top), "to_width": integers(1, w - to_left)},
        "alpha": torch.rand(rows, parts, generator=generator),
    }
    drawn["alpha"][:, 1::2] = 1.0
    whole = {"fit": 0.0, "to_top": 0.0, "to_left": 0.0, "to_height": float(h), "to_width": float(w), "alpha": 1.0}
    for name, value in whole.items():
        drawn[name][:, 0] = value
    for name, value in fixed.items():
        drawn[name] = torch.as_tensor(value, dtype=torch.float32).expand(rows, parts)
    return torch.stack([drawn[c].float() for c in COLUMNS], 2)


def ours(images, base=None, *, record, **options):
    return multi_crop(images, record, base=base, **options)


def plain(images, base=None, *, record, out_size, mean=None, std=None):
    size = (out_size, out_size) if isinstance(out_size, int) else out_size
    return reference.multi_crop(images, record, size, base, mean, std)


def raw_calls(images, base=None, *, record, out_size, mean=None, std=None):
    """The two registered operators with the arguments of one case."""
    size = (out_size, out_size) if isinstance(out_size, int) else out_size
    norm = None if mean is None else torch.tensor([mean, std], dtype=torch.float64)
    grad = torch.randn(len(record), images.shape[1], *size, dtype=images.dtype, requires_grad=True)
    sizes = (images.shape[0], *images.shape[2:])
    return [
        (OPS.multi_crop.default, (images, base, record, norm, *size, False)),
        (OPS.multi_crop.default, (images, base, record, norm, *size, True)),
        (OPS.multi_crop_backward.default, (grad, record, norm, *sizes, True, base is not None)),
        (OPS.multi_crop_backward.default, (grad, record, norm, *sizes, False, True)),
    ]


def batch(shape, layout="dense", base=False):
    def make(dtype):
        generator = torch.Generator().manual_seed(sum(shape))
        images = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        images = laid_out(images, layout)
        if not base:
            return (images,)
        return images, torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)

    return make


def case(name, shape, out_size, rows=3, parts=1, layout="dense", base=False, norm=False, **fixed):
    record = record_of(rows, max(shape[0], 1), shape[2:], out_size, parts, sum(shape), **fixed)
    options = {"record": record, "out_size": out_size}
    if norm:
        options |= {"mean": [0.1 * c - 0.2 for c in range(shape[1])], "std": [0.5 + 0.2 * c for c in range(shape[1])]}
    return Case(name, batch(shape, layout, base), options)


CASES = [
    case("one part", (3, 3, 14, 13), (11, 12), rows=5),
    case("larger", (2, 3, 9, 8), (21, 19), norm=True),
    case("smaller", (2, 1, 40, 37), (3, 5)),
    case("mixed", (4, 3, 12, 11), (9, 10), parts=2, base=True, norm=True),
    case("four parts", (3, 2, 10, 12), (8, 8), parts=4, norm=True),
    case("base", (2, 5, 7, 9), (17, 6), base=True),
    case("one image", (1, 3, 17, 16), (8, 9), rows=6, base=True),
    case("one pixel", (2, 2, 1, 1), (1, 1)),
    case("no record", (2, 3, 8, 8), (5, 5), rows=0, base=True),
    *(case(layout, (3, 3, 9, 10), (7, 7), parts=2, layout=layout) for layout in ("channels_last", "slice", "expanded")),
]


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "nan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


# a tap of weight zero is ignored in ours and gives 0 * NaN in torch's filter: crops whose filters have no such taps
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_nan(parts):
    boxes = {"top": 1, "left": 0, "height": 11, "width": 7}
    check_op(ours, plain, [case("nan", (3, 3, 12, 11), (8, 10), parts=parts, norm=True, **boxes)], checks=["nan"])


def test_many_records_over_several_threads():
    several = case("many", (9, 3, 20, 18), (16, 16), rows=67, parts=2, base=True, norm=True)
    check_op(ours, plain, [several], checks=["values", "repeats"])


def test_whole_images_are_bitwise():
    """A crop that is not resized, however rolled and mirrored, moves pixels and changes none, NaN included."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        images = torch.randn(3, 3, 9, 8).to(dtype)
        images[1, 1, 4, 4] = float("nan")
        box = {"top": 0, "left": 0, "height": 9, "width": 8}
        record = record_of(
            3, 3, (9, 8), (9, 8), source=torch.tensor([[2], [1], [0]]), flip=1, roll_y=2, roll_x=-3, **box
        )
        want = images.flip(0, 3).roll((2, -3), (2, 3))
        assert torch.equal(multi_crop(images, record, (9, 8)).nan_to_num(7), want.nan_to_num(7))


def test_whole_images_of_any_size_are_bitwise():
    """Also where a size is not one after a product with its inverse: 49 in float64, 41 in float32."""
    for dtype in (torch.float32, torch.float64):
        for size in (41, 49, 98):
            images = torch.randn(1, 2, size, size, dtype=dtype)
            record = record_of(1, 1, (size, size), (size, size), flip=0, top=0, left=0, height=size, width=size)
            roll = record[0, 0, 6:8].int().tolist()
            assert torch.equal(multi_crop(images, record, size), images.roll(roll, (2, 3)))


def test_mosaic_is_four_resized_crops():
    images = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    record = record_of(1, 4, (10, 10), (8, 8), parts=4, source=torch.arange(4), flip=0, roll_y=0, roll_x=0)
    places = {"fit": 1, "alpha": 1, "to_top": [0, 0, 4, 4], "to_left": [0, 4, 0, 4], "to_height": 4, "to_width": 4}
    for name, value in places.items():
        record[:, :, COLUMNS.index(name)] = torch.tensor(value, dtype=torch.float32)
    tiles = []
    for n, (top, left, height, width) in enumerate(record[0, :, 1:5].int().tolist()):
        crop = images[n : n + 1, :, top : top + height, left : left + width]
        tiles.append(torch.nn.functional.interpolate(crop, 4, mode="bilinear", antialias=True)[0])
    want = torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1)
    torch.testing.assert_close(multi_crop(images, record, 8)[0], want)


@pytest.mark.parametrize("size", [(10, 13, 5, 1), (7, 3, 9, 1), (10, 13, 1, 5), (13, 10, 4, 17), (64, 3, 5, 60)])
def test_filter(size):
    """As two products with matrices of triangles, which hold for one column too, where torch is wrong on the CPU."""

    def triangles(n, m):  # [m, n]
        support, centre = max(n / m, 1), (torch.arange(m, dtype=torch.float64) + 0.5) * n / m
        weights = (1 - (torch.arange(n) + 0.5 - centre[:, None]).abs() / support).clamp(min=0)
        return weights / weights.sum(1, keepdim=True)

    H, W, h, w = size
    images = torch.randn(1, 3, H, W, dtype=torch.float64)
    box = {"top": 0, "left": 0, "height": H, "width": W, "flip": 0, "roll_y": 0, "roll_x": 0}
    record = record_of(1, 1, (H, W), (h, w), **box)
    want = triangles(H, h) @ images @ triangles(W, w).T
    torch.testing.assert_close(multi_crop(images, record, (h, w)), want)
    torch.testing.assert_close(reference.multi_crop(images, record, (h, w)), want)


def test_the_gradient_of_base_alone_is_the_sum_of_the_images():
    images = torch.randn(5, 3, 14, 13, dtype=torch.float64, requires_grad=True)
    base = torch.randn(1, 3, 14, 13, dtype=torch.float64, requires_grad=True)
    record = record_of(7, 5, (14, 13), (9, 9), parts=2)
    alone = torch.autograd.grad(multi_crop(images.detach(), record, 9, base=base).sin().sum(), base)[0]
    of_images, of_base = torch.autograd.grad(multi_crop(images, record, 9, base=base).sin().sum(), (images, base))
    torch.testing.assert_close(alone, of_images.sum(0, keepdim=True))
    assert torch.equal(alone, of_base)


BAD_PARTS = [
    *(("source", v) for v in (-1, 3, float("nan"), 1e12)),
    *(("top", v) for v in (-1, 7, float("inf"))),
    *(("height", v) for v in (0, 9, -2)),
    *(("width", 20), ("to_top", -1), ("to_height", 7), ("to_left", 6), ("roll_x", float("nan"))),
]


@pytest.mark.parametrize(("column", "value"), BAD_PARTS)
def test_a_part_that_does_not_fit_makes_its_result_nan(column, value):
    images = torch.randn(3, 3, 8, 8, requires_grad=True)
    base = torch.zeros(1, 3, 8, 8, requires_grad=True)
    record = record_of(3, 3, (8, 8), (6, 6), parts=2, top=1, height=7)
    record[1, 1, COLUMNS.index(column)] = value
    out = multi_crop(images, record, 6, base=base)
    truth = reference.multi_crop(images, record, (6, 6), base)
    assert out[1].isnan().all()
    torch.testing.assert_close(out, truth, equal_nan=True)
    grads = (torch.autograd.grad(o, (images, base), torch.ones_like(o)) for o in (out, truth))
    for got, want in zip(*grads, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


def test_derivatives_of_any_order():
    images, record = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True), record_of(3, 2, (6, 6), (5, 7))

    def third(f):
        (first,) = torch.autograd.grad(f(images, record, (5, 7)).pow(4).sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), images, create_graph=True)
        return torch.autograd.grad(second.square().sum(), images)[0]

    torch.testing.assert_close(third(multi_crop), third(reference.multi_crop), rtol=1e-9, atol=1e-6)


def test_vmap_over_records():
    images = torch.randn(4, 3, 8, 8)
    records = torch.stack([record_of(6, 4, (8, 8), (5, 5), seed=s) for s in range(3)])
    records[1, 2, 0, 0] = 4  # no image of the next batch
    truth = torch.stack([multi_crop(images, record, 5) for record in records])
    got = torch.func.vmap(lambda record: multi_crop(images, record, 5))(records)
    assert torch.equal(got.nan_to_num(9), truth.nan_to_num(9))
    batches = torch.stack([images, images + 1, images + 2])
    truth = torch.stack([multi_crop(x, record, 5) for x, record in zip(batches, records, strict=True)])
    got = torch.func.vmap(lambda x, record: multi_crop(x, record, 5))(batches, records)
    assert torch.equal(got.nan_to_num(9), truth.nan_to_num(9))


def test_gradients_through_vmap():
    """Under vmap a tensor does not say whether its gradient is wanted outside."""
    images = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    base = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    record = record_of(4, 2, (8, 8), (5, 5))
    out = torch.func.vmap(lambda x: multi_crop(x, record, 5, base=base).square())(images)
    truth = torch.stack([reference.multi_crop(x, record, (5, 5), base).square() for x in images])
    for got, want in zip(*(torch.autograd.grad(o.sum(), (images, base)) for o in (out, truth)), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_by_inductor():
    images, record = torch.randn(4, 3, 8, 8, requires_grad=True), record_of(5, 4, (8, 8), (6, 6))
    norm = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    compiled = torch.compile(lambda x, r: multi_crop(2 * x, r, 6, **norm).square(), fullgraph=True)
    out, truth = compiled(images, record), multi_crop(2 * images, record, 6, **norm).square()
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), images)[0] for x in (out, truth)))


def test_direct_calls_have_gradients():
    """An operator of C++ without an autograd formula gives None, with no more than a warning."""
    images, record = torch.randn(2, 3, 6, 6, requires_grad=True), record_of(2, 2, (6, 6), (4, 4))
    (grad,) = torch.autograd.grad(OPS.multi_crop(images, None, record, None, 4, 4, False).sum(), images)
    assert torch.equal(grad, torch.autograd.grad(multi_crop(images, record, 4).sum(), images)[0])


ISA_SCRIPT = """
import torch, hashlib
from tests.ops.test_multi_crop import record_of
from pydistill.ops import multi_crop
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape, out in (((4, 3, 32, 32), (28, 28)), ((3, 1, 9, 8), (31, 33)), ((2, 6, 53, 39), (5, 6))):
        for parts in (1, 2):
            images, base = (torch.randn(n, *shape[1:], generator=generator).to(dtype).requires_grad_()
                            for n in (shape[0], 1))
            record = record_of(7, shape[0], shape[2:], out, parts)
            result = multi_crop(images, record, out, base=base, mean=[0.3] * shape[1], std=[0.7] * shape[1])
            weights = torch.randn(result.shape, generator=generator).to(dtype)
            for t in (result, *torch.autograd.grad(result, (images, base), weights)):
                digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


X, R, U = torch.randn(2, 3, 4, 4), record_of(2, 2, (4, 4), (3, 3)), torch.randn(1, 3, 4, 4)
BAD = [
    (("x", R, 3), {}, TypeError, "images: expected a tensor, got str"),
    ((X, [0.0], 3), {}, TypeError, "record: expected a tensor, got list"),
    ((X, R, 3), {"base": 1}, TypeError, "base: expected a tensor, got int"),
    ((X.int(), R, 3), {}, TypeError, "images: expected float32, float64, bfloat16 or float16, got torch.int32"),
    ((X, R.double(), 3), {}, TypeError, "record: expected float32, got torch.float64"),
    ((X, R, 3), {"base": U.double()}, TypeError, "base: expected torch.float32 as images, got torch.float64"),
    ((X[0], R, 3), {}, ValueError, r"images: expected \[N, C, H, W\] with C >= 1 and sides of 1 to 16384, got shape"),
    ((X[..., :0], R, 3), {}, ValueError, r"images: expected .* got shape \[2, 3, 4, 0\]"),
    ((X, R[0], 3), {}, ValueError, r"record: expected shape \[B, P, 14\] with P of 1 to 4, got \[1, 14\]"),
    ((X, R[..., :9], 3), {}, ValueError, r"record: expected .* got \[2, 1, 9\]"),
    ((X, R.expand(2, 5, 14), 3), {}, ValueError, r"record: expected .* got \[2, 5, 14\]"),
    ((X, R.to("meta"), 3), {}, ValueError, "record: expected device cpu as images, got meta"),
    ((X, R.clone().requires_grad_(), 3), {}, ValueError, "record: expected a constant"),
    ((X, R, 0), {}, ValueError, "out_size: expected one or two sides of 1 to 16384, got 0"),
    ((X, R, (3, 4, 5)), {}, ValueError, r"out_size: expected one or two sides .* got \(3, 4, 5\)"),
    ((X, R, 3), {"base": X}, ValueError, r"base: expected shape \[1, 3, 4, 4\], got \[2, 3, 4, 4\]"),
    ((X, R, 3), {"mean": (0.1,) * 3}, ValueError, "mean, std: expected both or neither, got mean alone"),
    ((X, R, 3), {"mean": (0.1,), "std": (1.0,)}, ValueError, r"mean: expected 3 numbers, one .* got shape \[1\]"),
    (
        (X, R, 3),
        {"mean": (0.1,) * 3, "std": (1, 0, 1)},
        ValueError,
        r"std: expected numbers above zero, got \[1, 0, 1\]",
    ),
    ((X, R, 3), {"backend": "fast"}, ValueError, "backend: expected one of"),
    ((X, R, 3), {"backend": "cuda"}, NotImplementedError, "multi_crop: backend='cuda' cannot run on cpu tensors"),
    ((X, R, 3), {"backend": "triton"}, NotImplementedError, "backend='triton' cannot run on cpu tensors"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        multi_crop(*arguments, **options)


RAW = [
    ((X[0], None, R, None, 3, 3, False), r"images: expected \[N, C, H, W\]"),
    ((X, U[0], R, None, 3, 3, False), r"base: expected \[N, C, H, W\]"),
    ((X, U, R[0], None, 3, 3, False), r"record: expected \[B, 1 to 4, 14\]"),
    ((X, U, R.double(), None, 3, 3, False), "record: expected float32"),
    ((X, U, R, torch.ones(2, 2), 3, 3, False), r"norm: expected \[2, 3\]"),
    ((X, U, R, torch.ones(2, 3), 3, 3, False), "norm: expected contiguous float64"),
    ((X, U, R, None, 0, 3, False), "expected sides of 1 to 16384, got 0 and 3"),
]


@pytest.mark.parametrize(("arguments", "message"), RAW)
def test_direct_calls_are_checked(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.multi_crop(*arguments)
    with pytest.raises(RuntimeError, match="record: expected 1 rows, got 2"):
        OPS.multi_crop_backward(X[:1], R, None, 2, 4, 4, True, True)


def test_meta_tensors():
    out = multi_crop(X.to("meta"), R.to("meta"), (5, 6))
    assert out.shape == (2, 3, 5, 6)
    assert out.device.type == "meta"


def test_the_reference_backend_is_the_reference():
    assert torch.equal(multi_crop(X, R, 3, backend="reference"), reference.multi_crop(X, R, (3, 3)))
