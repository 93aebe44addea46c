"""The siamese augmentation against its definition: a table of cases under `check_op`, and the messages."""

import pytest
import torch

from pydistill import reference
from pydistill.ops import augment_images
from pydistill.ops.augment import COLUMNS, IDENTITY
from pydistill.testing import CHECKS, Case, assert_close, check_op
from tests.ops.layouts import laid_out

OPS = torch.ops.pydistill
GROUPS = {
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("crop_y", "crop_x"),
    "cutout": ("cutout_top", "cutout_left", "cutout_height", "cutout_width"),
    "flip": ("flip",),
    "scale": ("scale_x", "scale_y"),
    "rotate": ("angle",),
}


def record_of(rows, H, W, operations=tuple(GROUPS), seed=0):
    """Parameters of all named operations, drawn wider than in the method repos; the others at identity."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(rows, generator=generator)

    drawn = {
        **{"brightness": uniform(-0.5, 0.5), "saturation": uniform(0, 2), "contrast": uniform(0.5, 1.5)},
        **{"crop_y": uniform(-0.2 * H - 1, 0.2 * H + 1).round(), "crop_x": uniform(-0.2 * W - 1, 0.2 * W + 1).round()},
        **{"cutout_top": uniform(-H / 4, 3 * H / 4).round(), "cutout_left": uniform(-W / 4, 3 * W / 4).round()},
        **{"cutout_height": torch.full((rows,), H // 2), "cutout_width": torch.full((rows,), W // 2)},
        **{"flip": (uniform(0, 1) < 0.5).float(), "angle": uniform(-0.6, 0.6)},
        **{"scale_x": uniform(0.7, 1.4), "scale_y": uniform(0.7, 1.4)},
    }
    active = {column for name in operations for column in GROUPS[name]}
    columns = [drawn[c] if c in active else torch.full((rows,), IDENTITY[c]) for c in COLUMNS]
    return torch.stack(columns, 1).float()


def ours(images, *, record, **options):
    return augment_images(images, record, **options)


def plain(images, *, record, **options):
    return reference.augment_images(images, record, **options)


def raw_calls(images, *, record, flip_batch=False, align_corners=True):
    """The two registered operators with the arguments of one case."""
    grad = torch.randn(len(record), *images.shape[1:], dtype=images.dtype, requires_grad=True)
    return [
        (OPS.augment.default, (images, record, flip_batch, align_corners, False)),
        (OPS.augment.default, (images, record, flip_batch, align_corners, True)),
        (OPS.augment_backward.default, (grad, record, flip_batch, align_corners)),
    ]


def batch(shape, layout="dense"):
    def make(dtype):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)
        images = laid_out(images, layout)
        return (images,)

    return make


def case(name, shape, operations=tuple(GROUPS), layout="dense", **options):
    rows = shape[0] * (2 if options.get("flip_batch") else 1)
    record = record_of(rows, *shape[2:], operations, seed=sum(shape))
    return Case(name, batch(shape, layout), {"record": record, **options})


# channels go in groups of four, but one alone
SHAPES = [(2, 3, 32, 32), (2, 1, 28, 28), (1, 3, 33, 31), (2, 4, 9, 16), (1, 5, 17, 6), (2, 9, 5, 5), (0, 3, 8, 8)]
WHOLE = [case("x".join(map(str, shape)), shape) for shape in SHAPES]
WHOLE += [case(f"flip_batch {'x'.join(map(str, s))}", s, flip_batch=True) for s in ((2, 3, 12, 11), (0, 3, 8, 8))]
WHOLE += [case("64x64", (1, 3, 64, 64)), case("other corners", (2, 3, 12, 17), align_corners=False)]
WHOLE += [case(layout, (3, 3, 10, 9), layout=layout) for layout in ("channels_last", "slice", "expanded")]
PARTS = [case(name, (4, 3, 11, 12), (name,)) for name in GROUPS]
PARTS += [case("scale and rotate", (4, 3, 11, 12), ("scale", "rotate")), case("nothing", (2, 3, 7, 8), ())]
PARTS += [case("all but scale", (4, 6, 11, 12), ("color", "crop", "cutout", "flip", "rotate"), flip_batch=True)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


# if an operation is at its identity, ours omits it and the definition multiplies by zero and one
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "nan"])
@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.name)
def test_matrix_of_single_operations(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def test_many_images_over_several_threads():
    check_op(ours, plain, [case("many", (67, 3, 16, 16), flip_batch=True)], checks=["values", "repeats"])


@pytest.mark.parametrize("shape", [(2, 3, 1, 7), (2, 3, 7, 1), (2, 1, 1, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_images_of_one_row_or_column(shape, align_corners):
    check_op(ours, plain, [case("thin", shape, align_corners=align_corners)], checks=["values", "gradcheck"])


def test_identity_is_bitwise():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        images = torch.randn(3, 3, 9, 8).to(dtype)
        record = torch.tensor(list(IDENTITY.values())).expand(3, -1)
        assert torch.equal(augment_images(images, record), images)
        doubled = augment_images(images, record.repeat(2, 1), flip_batch=True)
        assert torch.equal(doubled, torch.cat([images, images.flip(3)]))


def test_flip_batch_is_that_of_the_mirrored_images():
    images, record = torch.randn(5, 3, 14, 13), record_of(10, 14, 13)
    doubled = torch.cat([images, images.flip(3)])
    torch.testing.assert_close(augment_images(images, record, flip_batch=True), augment_images(doubled, record))


def test_far_parameters():
    """Nothing left of the image, scales that shrink it to a point or mirror it, and quarter turns."""
    far = {
        **{"crop_y": (40.0, -9.0, 1e30), "crop_x": (9.0, -1e30)},
        **{"cutout_top": (-50.0, 50.0, -1e20), "cutout_height": (1e20, 0.0, -3.0), "cutout_width": (1e20,)},
        **{"scale_x": (0.0, -1.0, 30.0, 0.01, 1e-30, 1e30), "scale_y": (0.0, -0.5, 9.0, 1e-9)},
        **{"angle": (3.1415927, 1.5707964, -2.5, 100.0)},
    }
    images = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    for column, values in far.items():
        for value in values:
            record = record_of(1, 9, 9, seed=3)
            record[:, COLUMNS.index(column)] = value
            if abs(value) > 1e9 and not column.startswith("scale"):
                clamped = record.clone()  # the definition uses integers, which do not reach that far
                clamped[:, COLUMNS.index(column)] = 1000.0 if value > 0 else -1000.0
            else:
                clamped = record
            check = Case(f"{column}={value}", lambda _: (images,), {"record": record})
            leaf = images.clone().requires_grad_()
            actual, truth = ours(leaf, record=record), plain(leaf, record=clamped)
            assert_close(check.name, actual, truth, rtol=1e-9)
            grad = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            pairs = (torch.autograd.grad(out, leaf, grad)[0] for out in (actual, truth))
            assert_close(f"{check.name} gradient", *pairs, rtol=1e-9)


@pytest.mark.parametrize("column", ["scale_x", "scale_y", "angle"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_parameters_make_their_image_nan(column, value):
    images, record = torch.randn(3, 3, 8, 8, requires_grad=True), record_of(3, 8, 8)
    record[1, COLUMNS.index(column)] = value
    out = augment_images(images, record)
    (grad,) = torch.autograd.grad(out, images, torch.ones_like(out))
    for tensor in (out, grad):
        assert tensor[1].isnan().all()
        assert tensor[[0, 2]].isfinite().all()


def test_derivatives_of_any_order():
    images, record = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True), record_of(2, 6, 6)

    def third(f):
        (first,) = torch.autograd.grad(f(images, record).pow(4).sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), images, create_graph=True)
        return torch.autograd.grad(second.square().sum(), images)[0]

    torch.testing.assert_close(third(augment_images), third(reference.augment_images), rtol=1e-9, atol=1e-6)


def test_vmap_over_records():
    images, records = torch.randn(4, 3, 8, 8), torch.stack([record_of(8, 8, 8, seed=s) for s in range(3)])
    for flip_batch in (False, True):
        some = records if flip_batch else records[:, :4]
        out = torch.func.vmap(lambda record, f=flip_batch: augment_images(images, record, flip_batch=f))(some)
        truth = [augment_images(images, record, flip_batch=flip_batch) for record in some]
        assert torch.equal(out, torch.stack(truth))


def test_compiled_by_inductor():
    images, record = torch.randn(4, 3, 8, 8, requires_grad=True), record_of(4, 8, 8)
    compiled = torch.compile(lambda x, r: augment_images(2 * x, r).square(), fullgraph=True)
    out, truth = compiled(images, record), augment_images(2 * images, record).square()
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), images)[0] for x in (out, truth)))


def test_direct_calls_have_gradients():
    """An operator of C++ without an autograd formula gives None, with no more than a warning."""
    images, record = torch.randn(2, 3, 6, 6, requires_grad=True), record_of(2, 6, 6)
    (grad,) = torch.autograd.grad(OPS.augment(images, record, False, True, False).sum(), images)
    assert torch.equal(grad, torch.autograd.grad(augment_images(images, record).sum(), images)[0])


ISA_SCRIPT = """
import torch, hashlib
from tests.ops.test_augment import GROUPS, record_of
from pydistill.ops import augment_images
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((4, 3, 32, 32), (3, 1, 28, 28), (2, 6, 13, 19)):
        for operations in (tuple(GROUPS), ("scale",), ("rotate",), ("color",)):
            images = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            record = record_of(2 * len(images), *shape[2:], operations)
            out = augment_images(images, record, flip_batch=True)
            (grad,) = torch.autograd.grad(out, images, torch.randn(out.shape, generator=generator).to(dtype))
            for t in (out, grad):
                digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


X, R = torch.randn(2, 3, 4, 4), record_of(2, 4, 4)
BAD = [
    (("x", R), {}, TypeError, "images: expected a tensor, got str"),
    ((X, [0.0]), {}, TypeError, "record: expected a tensor, got list"),
    ((X.int(), R), {}, TypeError, "images: expected float32, float64, bfloat16 or float16, got torch.int32"),
    ((X, R.double()), {}, TypeError, "record: expected float32, got torch.float64"),
    ((X[0], R), {}, ValueError, r"images: expected \[B, C, H, W\] with C >= 1 and sides of 1 to 16384, got shape"),
    ((X[:, :0], R), {}, ValueError, r"images: expected .* got shape \[2, 0, 4, 4\]"),
    ((X, R[:1]), {}, ValueError, r"record: expected shape \[2, 13\] .* got \[1, 13\]"),
    ((X, R), {"flip_batch": True}, ValueError, r"record: expected shape \[4, 13\] .* got \[2, 13\]"),
    ((X, R.to("meta")), {}, ValueError, "record: expected device cpu as images, got meta"),
    ((X, R.clone().requires_grad_()), {}, ValueError, "record: expected a constant"),
    ((X, R), {"backend": "fast"}, ValueError, "backend: expected one of"),
    ((X, R), {"backend": "cuda"}, NotImplementedError, "augment: backend='cuda' cannot run on cpu tensors"),
    ((X, R), {"backend": "triton"}, NotImplementedError, "backend='triton' cannot run on cpu tensors"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        augment_images(*arguments, **options)


RAW = [
    ((X[0], R, False, True, False), r"images: expected \[B, C, H, W\]"),
    ((X, R[:1], False, True, False), r"record: expected \[2, 13\]"),
    ((X, R.double(), False, True, False), "record: expected float32"),
    ((X.int(), R, False, True, False), "images: expected float32"),
    ((X[..., :0], R, False, True, False), "images: expected images with channels and pixels"),
]


@pytest.mark.parametrize(("arguments", "message"), RAW)
def test_direct_calls_are_checked(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.augment(*arguments)
    with pytest.raises(RuntimeError, match="grad: expected an even number of images for flip_batch, got 3"):
        OPS.augment_backward(X[[0, 0, 1]], R, True, True)


def test_meta_tensors():
    out = augment_images(X.to("meta"), torch.cat([R, R]).to("meta"), flip_batch=True)
    assert out.shape == (4, 3, 4, 4)
    assert out.device.type == "meta"


def test_the_reference_backend_is_the_reference():
    assert torch.equal(augment_images(X, R, backend="reference"), reference.augment_images(X, R))
