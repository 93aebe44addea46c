"""Max pooling against torch's: cases under `check_op`, equal bits, ties and non-finite values, and the messages."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import reference
from pydistill.ops import max_pool2d
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def laid_out(x, layout):
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        N, C, H, W = x.shape
        wide = x.new_zeros(2 * N, C + 1, H, 2 * W)
        wide[::2, 1:, :, ::2] = x
        return wide[::2, 1:, :, ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def images(N, C, H, W, layout="channels-last"):
    def make(dtype):
        generator = torch.Generator().manual_seed(N * C + H * W)
        return (laid_out(torch.randn(N, C, H, W, generator=generator, dtype=torch.float64).to(dtype), layout),)

    return make


def case(name, N, C, H, W, sizes=(3, 2, 1), layout="channels-last"):
    return Case(name, images(N, C, H, W, layout), dict(zip(("kernel_size", "stride", "padding"), sizes, strict=True)))


def raw_calls(x, kernel_size, stride, padding):
    sizes = (kernel_size, stride, padding)
    y, which = OPS.max_pool2d(x.detach(), *sizes)
    grad = torch.randn_like(y).requires_grad_()
    return [
        (OPS.max_pool2d.default, (x, *sizes)),
        (OPS.max_pool2d_gather.default, (x, which, *sizes)),
        (OPS.max_pool2d_backward.default, (grad, which, *x.shape[2:], *sizes)),
    ]


# registers hold 2 to 16 channels
CASES = [
    case("a ResNet's", 2, 17, 9, 8),
    case("halves", 2, 8, 6, 6, (2, 2, 0)),
    case("halves of odd", 1, 5, 7, 9, (2, 2, 0)),
    case("padded halves", 1, 16, 5, 4, (2, 2, 1)),
    case("every window", 2, 3, 5, 6, (3, 1, 1)),
    case("no padding", 1, 33, 7, 8, (3, 2, 0)),
    case("gaps", 1, 4, 11, 8, (2, 3, 0)),
    case("overlapping twos", 1, 7, 4, 5, (2, 1, 1)),
    case("large windows", 1, 2, 17, 18, (15, 4, 7)),
    case("copies", 1, 3, 4, 5, (1, 1, 0)),
    case("one pixel", 1, 1, 1, 1),
    case("row", 3, 3, 1, 11),
    case("no images", 0, 4, 5, 6),
    case("NCHW", 2, 18, 6, 7, layout="NCHW"),
    case("slice", 2, 5, 6, 5, layout="slice"),
    case("expanded", 3, 5, 6, 5, layout="expanded"),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(max_pool2d, reference.max_pool2d, [case], raw_calls=raw_calls, checks=[check])


def same(a, b):
    return torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4)) and torch.equal(a.isnan(), b.isnan())


SIZES = [(3, 2, 1), (3, 2, 0), (2, 2, 0), (2, 2, 1), (3, 1, 1), (3, 3, 1), (2, 3, 1), (5, 2, 2), (15, 7, 7)]
SHAPES = [(2, 1, 15, 16), (1, 7, 17, 15), (2, 37, 16, 19)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_winners_are_those_of_torch(sizes, dtype):
    """With few values, so that most windows have ties; zeros of both signs, infinities and NaN among them."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, -INF, -INF, NAN], dtype=dtype)
    for shape in SHAPES:
        for allowed in (4, 6, 8, 9):
            generator = torch.Generator().manual_seed(allowed)
            x = laid_out(values[torch.randint(allowed, shape, generator=generator)], "channels-last")
            x[0, :, :8, :8] = -INF  # also in windows with nothing else
            y, which = OPS.max_pool2d(x, *sizes)
            truth, indices = F.max_pool2d(x, *sizes, return_indices=True)
            assert same(y, truth)
            assert torch.equal(y.signbit()[~y.isnan()], truth.signbit()[~y.isnan()])
            assert torch.equal(named(which, x.shape[3], *sizes), indices)


def named(which, width, kernel, stride, padding):
    """torch's indices from our numbers."""
    rows, columns = (torch.arange(size) * stride - padding for size in which.shape[2:])
    which = which.long()
    return (rows[:, None] + which // kernel) * width + columns + which % kernel


def gradient(pool, x, sizes):
    x = x.detach().requires_grad_()
    y = pool(x, *sizes)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradient_is_that_of_torch(sizes, dtype):
    for shape in SHAPES:
        for layout in ("channels-last", "NCHW"):
            (x,) = images(*shape, layout)(dtype)
            found, truth = gradient(max_pool2d, x, sizes), gradient(F.max_pool2d, x, sizes)
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
            if sizes[0] <= sizes[1]:  # no sums
                assert torch.equal(found, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_gradients_are_rounded_once(dtype):
    (x,) = images(2, 19, 9, 12)(dtype)
    y, which = OPS.max_pool2d(x, 3, 1, 1)
    grad = torch.randn(y.shape).to(dtype)
    found = OPS.max_pool2d_backward(grad, which, 9, 12, 3, 1, 1)
    assert torch.equal(found, OPS.max_pool2d_backward(grad.float(), which, 9, 12, 3, 1, 1).to(dtype))


def test_gradients_that_are_not_finite_stay_where_they_belong():
    (x,) = images(1, 20, 7, 7)(torch.float32)
    y, which = OPS.max_pool2d(x, 3, 2, 1)
    grad = torch.zeros_like(y)
    grad[0, 3, 1, 1], grad[0, 18, 2, 2] = NAN, INF
    found = OPS.max_pool2d_backward(grad, which, 7, 7, 3, 2, 1)
    assert found.isnan().sum() == 1
    assert found.isinf().sum() == 1
    assert (found == 0).sum() == found.numel() - 2


def test_gather_picks_and_backward_is_its_adjoint():
    (x,) = images(2, 13, 9, 10)(torch.float64)
    other = torch.randn_like(x)
    y, which = OPS.max_pool2d(x, 3, 2, 1)
    assert torch.equal(OPS.max_pool2d_gather(x, which, 3, 2, 1), y)
    picked = OPS.max_pool2d_gather(other, which, 3, 2, 1)
    flat = other.flatten(2).gather(2, named(which, 10, 3, 2, 1).flatten(2)).view_as(y)
    assert torch.equal(picked, flat)
    grad = torch.randn_like(y)
    back = OPS.max_pool2d_backward(grad.contiguous(), which.contiguous(), 9, 10, 3, 2, 1)  # of any layout
    torch.testing.assert_close((grad * picked).sum(), (back * other).sum(), rtol=1e-12, atol=1e-12)


def test_outputs_are_channels_last_whatever_the_input():
    for layout in ("channels-last", "NCHW", "slice", "expanded"):
        (x,) = images(2, 5, 7, 4, layout)(torch.float32)
        assert max_pool2d(x).is_contiguous(memory_format=torch.channels_last)
        y, which = OPS.max_pool2d(x, 3, 2, 1)
        assert which.dtype == torch.uint8
        assert which.stride() == y.stride()
        grad = OPS.max_pool2d_backward(y.contiguous(), which, 7, 4, 3, 2, 1)
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_third_derivative():
    def third(pool):
        x = images(1, 3, 7, 6)(torch.float64)[0].requires_grad_()
        value = pool(x, 3, 2, 1).sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * torch.linspace(-1, 2, grad.numel(), dtype=grad.dtype).view_as(grad)).sum()
        return grad

    torch.testing.assert_close(third(max_pool2d), third(F.max_pool2d), rtol=1e-12, atol=1e-12)


def test_threads_share_rows_with_equal_bits():
    (x,) = images(3, 35, 60, 61)(torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            y, which = OPS.max_pool2d(x, 3, 2, 1)
            found.append((y, which, OPS.max_pool2d_backward(y, which, 60, 61, 3, 2, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


PROBE = """
import hashlib, pydistill, torch
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for sizes in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 39, 9, 10, generator=generator).to(dtype)
        x[:, :, 2:4, 3:6] = x[0, 0, 2, 3]
        x[0, :, 7] = -float("inf")
        y, which = torch.ops.pydistill.max_pool2d(x, *sizes)
        grad = torch.randn(y.shape, generator=generator).to(dtype)
        back = torch.ops.pydistill.max_pool2d_backward(grad, which, 9, 10, *sizes)
        picked = torch.ops.pydistill.max_pool2d_gather(back, which, *sizes)
        for t in (y, which, back, picked):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_give_equal_bits(same_in_every_isa):
    same_in_every_isa(PROBE)


X = torch.ones(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x: expected a tensor, got NoneType", lambda: max_pool2d(None)),
        (TypeError, "x: expected float32, .*, got torch.int64", lambda: max_pool2d(X.long())),
        (TypeError, r"kernel_size: expected an int, got \(3, 3\)", lambda: max_pool2d(X, (3, 3))),
        (TypeError, r"stride: expected an int, got None", lambda: max_pool2d(X, 3, None)),
        (TypeError, r"padding: expected an int, got True", lambda: max_pool2d(X, 3, 2, True)),
        (ValueError, "kernel_size: expected 1 to 15, got 0", lambda: max_pool2d(X, 0)),
        (ValueError, "kernel_size: expected 1 to 15, got 16", lambda: max_pool2d(X, 16)),
        (ValueError, "stride: expected at least 1, got 0", lambda: max_pool2d(X, 3, 0)),
        (ValueError, "padding: expected 0 to 1, half of kernel_size, got 2", lambda: max_pool2d(X, 3, 2, 2)),
        (ValueError, "padding: expected 0 to 1, .*, got -1", lambda: max_pool2d(X, 3, 2, -1)),
        (ValueError, r"x: expected \[N, C, H, W\].*, got shape \[3, 4, 4\]", lambda: max_pool2d(X[0])),
        (ValueError, r"x: expected .* C >= 1 .*, got shape \[1, 0, 4, 4\]", lambda: max_pool2d(X[:, :0])),
        (ValueError, r"x: expected .* H, W >= 1, got shape \[1, 3, 0, 4\]", lambda: max_pool2d(X[:, :, :0])),
        (ValueError, r"x: expected .* H, W >= 5, got shape \[1, 3, 4, 4\]", lambda: max_pool2d(X, 5, 1, 0)),
    ],
)
def test_messages(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_calls_are_checked_too():
    y, which = OPS.max_pool2d(X, 3, 2, 1)
    for call in (
        lambda: OPS.max_pool2d(X[0], 3, 2, 1),
        lambda: OPS.max_pool2d(X.long(), 3, 2, 1),
        lambda: OPS.max_pool2d(X[:, :0], 3, 2, 1),
        lambda: OPS.max_pool2d(X[:, :, :0], 3, 2, 1),
        lambda: OPS.max_pool2d(X, 0, 2, 0),
        lambda: OPS.max_pool2d(X, 16, 2, 8),
        lambda: OPS.max_pool2d(X, 3, 0, 1),
        lambda: OPS.max_pool2d(X, 3, 2, 2),
        lambda: OPS.max_pool2d(X, 3, 2, -1),
        lambda: OPS.max_pool2d(X, 3, 2, 2**62 + 1),
        lambda: OPS.max_pool2d(X, 5, 2, 0),
        lambda: OPS.max_pool2d_gather(X[0], which, 3, 2, 1),
        lambda: OPS.max_pool2d_gather(X, which[0], 3, 2, 1),
        lambda: OPS.max_pool2d_gather(X, which.long(), 3, 2, 1),
        lambda: OPS.max_pool2d_gather(X, which[:, :2], 3, 2, 1),
        lambda: OPS.max_pool2d_gather(X, which, 3, 1, 1),
        lambda: OPS.max_pool2d_backward(y[0], which, 4, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y[:, :, :1], which, 4, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y, which[:, :, :1], 4, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y, which.int(), 4, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y, which, 6, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y, which, 2**62, 4, 3, 2, 1),
        lambda: OPS.max_pool2d_backward(y, which, 0, 4, 3, 2, 1),
    ):
        with pytest.raises(RuntimeError, match=r"(x|grad|which|kernel|stride|padding): expected"):
            call()


def test_numbers_that_name_nothing_pick_nothing():
    which = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert not OPS.max_pool2d_gather(X, which, 3, 2, 1).any()
    assert not OPS.max_pool2d_backward(X[:, :, :2, :2], which, 4, 4, 3, 2, 1).any()


def test_a_stride_beyond_the_image():
    for stride in (5, 2**62):
        y, which = OPS.max_pool2d(X, 3, stride, 1)
        assert y.shape == (1, 3, 1, 1)
        assert OPS.max_pool2d_backward(y, which, 4, 4, 3, stride, 1).sum() == 3


def test_backends():
    assert torch.equal(max_pool2d(X), max_pool2d(X, backend="reference"))
    assert torch.equal(max_pool2d(X, 2, 2, 0, backend="cpu"), F.max_pool2d(X, 2))
    assert max_pool2d(X.to("meta")).shape == (1, 3, 2, 2)
    with pytest.raises(NotImplementedError, match="max_pool2d has no cuda kernel; it has reference, cpu"):
        max_pool2d(X, backend="cuda")
