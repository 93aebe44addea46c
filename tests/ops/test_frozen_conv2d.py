"""The 3x3 convolution with frozen filters against torch's: cases under `check_op`, accuracy, and the messages."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import reference
from pydistill.ops import FrozenFilters, frozen_conv2d, frozen_filters
from pydistill.ops.frozen_conv2d import _transformed
from pydistill.testing import CHECKS, Case, check_op

OP = torch.ops.pydistill.frozen_conv2d.default


def weight(K, C, dtype=torch.float64, taps=3):
    generator = torch.Generator().manual_seed(K * C)
    return (torch.randn(K, C, taps, taps, generator=generator, dtype=torch.float64) / (taps * C**0.5)).to(dtype)


def ours(x, filters, stride):
    return frozen_conv2d(x, filters.to(x.dtype), stride=stride)


def plain(x, filters, stride):
    return reference.frozen_conv2d(x, filters, stride)


def raw_calls(x, filters, stride):
    made = frozen_filters(filters, stride=stride)
    if stride == 2:
        x = torch.randn(2, x.shape[1], 8, 10, dtype=x.dtype, requires_grad=True)
    taps, before = {(3, 1): (3, 1), (3, 2): (2, 1), (7, 2): (4, 2)}[filters.shape[2], stride]
    return [(OP, (x, made.forward, made.adjoint, taps, before))]


def images(N, C, H, W, layout="channels-last"):
    def make(dtype):
        generator = torch.Generator().manual_seed(N * C + H * W)
        x = torch.randn(N, C, H, W, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "slice":
            wide = x.new_zeros(2 * N, C + 1, H, 2 * W)
            wide[::2, 1:, :, ::2] = x
            x = wide[::2, 1:, :, ::2]
        if layout == "expanded":
            x = x[:1].expand(N, C, H, W)
        return (x,)

    return make


def case(name, N, C, K, H, W, layout="channels-last", taps=3, stride=1, **options):
    return Case(name, images(N, C, H, W, layout), {"filters": weight(K, C, taps=taps), "stride": stride}, **options)


def geometry(taps, stride):
    return {"stride": stride, "padding": taps // 2}


# tiles of 4x4, vectors of 16 or 8 channels, products of six rows, chunks of 30 or 66 tiles, parts of 8 vectors
CASES = [
    case("whole tiles", 2, 16, 16, 8, 8),
    case("partial tiles", 2, 17, 9, 7, 5),
    *(case(f"size {s}", 1, 8, 16, s, s) for s in (3, 5)),
    case("ends of tiles", 2, 16, 16, 6, 7),
    case("one pixel", 1, 1, 1, 1, 1),
    case("row", 3, 3, 5, 1, 11),
    case("no images", 0, 4, 3, 5, 6),
    case("NCHW", 2, 8, 16, 6, 7, "NCHW"),
    case("slice", 2, 5, 7, 6, 5, "slice"),
    case("expanded", 3, 5, 7, 6, 5, "expanded"),
    case("chunks", 2, 3, 4, 25, 21),
    # sums of so many products are held to four times torch's error in float32, below
    case("parts", 1, 130, 140, 6, 5, dtypes=(torch.bfloat16,)),
    case("stem", 2, 3, 17, 16, 14, "NCHW", taps=7, stride=2),
    case("odd stem", 1, 2, 3, 7, 9, taps=7, stride=2),
    case("wide stem", 1, 9, 3, 7, 9, taps=7, stride=2),
    # tiles of 5x5; vectors of 16 or 8 channels may or may not hold those of one pixel of a cell
    case("stride 2", 2, 16, 16, 20, 10, stride=2),
    case("stride 2, ends of tiles", 2, 8, 16, 14, 16, "NCHW", stride=2),
    case("stride 2, odd", 1, 5, 7, 13, 5, "slice", stride=2),
    case("stride 2, one pixel", 1, 1, 1, 1, 1, stride=2),
    case("stride 2, parts", 1, 36, 40, 6, 5, stride=2, dtypes=(torch.bfloat16,)),
]


# an infinite input makes NaN of a tile, of which a direct convolution makes some infinities: see below
@pytest.mark.parametrize("check", [check for check in CHECKS if check != "nan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def relative_error(value, truth):
    return float((value.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("taps", "stride", "channels", "size"),
    [(3, 1, 64, 16), (3, 1, 128, 12), (3, 1, 256, 14), (3, 1, 512, 7), (3, 2, 64, 20), (3, 2, 128, 28), (7, 2, 3, 40)],
)
def test_float32_error_is_within_a_few_times_that_of_a_direct_convolution(taps, stride, channels, size):
    (x,) = images(2, channels, size, size)(torch.float32)
    w = weight(64 if taps == 7 else stride * channels, channels, torch.float32, taps)

    def both(convolve, x):
        x = x.detach().requires_grad_()
        y = convolve(x)
        return y, torch.autograd.grad(y, x, torch.sin(torch.arange(y.numel()).view_as(y) * 1.7).to(y.dtype))[0]

    truth = both(lambda x: F.conv2d(x, w.double(), **geometry(taps, stride)), x.double())
    direct = both(lambda x: F.conv2d(x, w, **geometry(taps, stride)), x)
    filters = frozen_filters(w, stride=stride)
    found = both(lambda x: frozen_conv2d(x, filters), x)
    # tiles of four taps concentrate it in their outer rows; a direct gradient of 3x3 taps with stride 2 has sums a
    # quarter as long as those here
    norms, largest = {(3, 1): ((4, 4), (4, 4)), (3, 2): ((4, 7), (4, 9)), (7, 2): ((4, 4), (6, 6))}[taps, stride]
    for i, t in enumerate(t.detach() for t in truth):
        assert relative_error(found[i], t) <= norms[i] * relative_error(direct[i], t)
        assert (found[i] - t).abs().max() <= largest[i] * (direct[i] - t).abs().max()


def of_bf16(convolve, x):
    """A convolution of bfloat16 images, and its gradient to them."""
    x = x.bfloat16().requires_grad_()
    y = convolve(x)
    grad = torch.sin(torch.arange(y.numel()).view_as(y) * 1.7).bfloat16()
    return y.detach(), torch.autograd.grad(y, x, grad.to(y.dtype))[0]


def exact(w, x, stride=1):
    """In float64, of what the images are in bfloat16."""
    return of_bf16(lambda x: F.conv2d(x.double(), w.double(), **geometry(w.shape[2], stride)), x)


@pytest.mark.parametrize(
    ("taps", "stride", "channels", "size"),
    [
        *((3, 1, *sizes) for sizes in ((5, 9), (64, 16), (128, 12), (256, 14), (512, 7))),
        *((3, 2, *sizes) for sizes in ((5, 9), (64, 20), (128, 28), (256, 14))),
        *((7, 2, *sizes) for sizes in ((3, 40), (5, 21), (12, 16))),
    ],
)
def test_bfloat16_error_is_below_that_of_a_direct_convolution(taps, stride, channels, size):
    (x,) = images(2, channels, size, size)(torch.float32)
    w = weight(64 if taps == 7 else stride * channels, channels, torch.float32, taps)
    for image in (x, x.relu(), x + 3):  # sums of one sign are the largest
        truth = exact(w, image, stride)
        rounded = w.bfloat16().float()

        def convolve(x, w=rounded):
            return F.conv2d(x.float(), w, **geometry(taps, stride)).bfloat16()

        direct = of_bf16(convolve, image)
        found = of_bf16(lambda x: frozen_conv2d(x, w, stride=stride), image)
        for a, b, t in zip(found, direct, truth, strict=True):
            assert relative_error(a, t) <= relative_error(b, t)


def test_bfloat16_sums_do_not_overflow():
    """Where every product has one sign, and where one channel holds everything."""
    ones = torch.ones(1, 512, 7, 7)
    alone = torch.zeros(1, 512, 7, 7)
    alone[:, 17] = 3
    for x in (ones, 1000 * ones, alone, -alone):
        for w in (
            torch.ones(32, 512, 3, 3),
            torch.randn(32, 512, 3, 3).abs(),
            alone[0, :, :3, :3].expand(32, -1, -1, -1),
        ):
            truth, _ = exact(w, x)
            assert relative_error(frozen_conv2d(x.bfloat16(), w), truth) < 4e-3


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e-12, 1e12, 1e25])
def test_bfloat16_is_scaled_to_images_of_any_size(size):
    x, w = images(1, 34, 9, 9)(torch.float32)[0], weight(8, 34, torch.float32)
    x[:, :, :4] = 0
    (truth, _), found = exact(w, x * size), frozen_conv2d((x * size).bfloat16(), w)
    assert relative_error(found.double() / size, truth / size) < 4e-3
    assert found[:, :, :3].eq(0).all()  # a tile of zeros


def test_bfloat16_filters_are_scaled_one_by_one():
    x, w = images(1, 34, 9, 9)(torch.float32)[0], weight(8, 34, torch.float32)
    w *= torch.tensor([1e-20, 1e-6, 0, 1, 1, 1e4, 1e10, float("nan")])[:, None, None, None]
    (truth, _), found = exact(w, x), frozen_conv2d(x.bfloat16(), w)
    for k in (0, 1, 3, 4, 5, 6):
        assert relative_error(found[:, k], truth[:, k]) < 4e-3
    assert found[:, 2].eq(0).all()
    assert found[:, 7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(poison, dtype):
    (x,) = images(2, 20, 13, 13)(dtype)
    x[1, 3, 4, 6] = poison
    w = weight(18, 20, dtype)
    found, truth = frozen_conv2d(x, w), reference.frozen_conv2d(x, w, 1)
    assert not found[~truth.isfinite()].isfinite().any()
    # rows 4 and 6 are seen by the tiles of rows 0 to 7 and 4 to 7, one more each way where the position is at an edge
    spoilt = torch.zeros(13, 13, dtype=torch.bool)
    spoilt[0:8, 4:8] = True
    assert found[0].isfinite().all()
    assert found[1][:, ~spoilt].isfinite().all()
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1][:, ~spoilt], truth[1][:, ~spoilt], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_channels_last_whatever_the_input(dtype):
    w = weight(7, 5, dtype)
    for layout in ("channels-last", "NCHW", "slice", "expanded"):
        (x,) = images(2, 5, 7, 4, layout)(dtype)
        assert frozen_conv2d(x, w).is_contiguous(memory_format=torch.channels_last)


def test_third_derivative():
    filters = frozen_filters(weight(5, 3))

    def third(convolve):
        x = images(1, 3, 5, 6)(torch.float64)[0].requires_grad_()
        value = convolve(x).sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * torch.linspace(-1, 2, grad.numel(), dtype=grad.dtype).view_as(grad)).sum()
        return grad

    torch.testing.assert_close(
        third(lambda x: frozen_conv2d(x, filters)),
        third(lambda x: reference.frozen_conv2d(x, filters.weight, 1)),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_threads_share_chunks_and_parts_with_equal_bits(dtype, stride):
    x, w = images(3, 34, 30, 30)(dtype)[0], frozen_filters(weight(200, 34, dtype), stride=stride)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            found.append(frozen_conv2d(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


COMPARE = """
import torch
from pydistill.ops import frozen_conv2d
generator = torch.Generator().manual_seed(1)
x = torch.randn(2, 35, 9, 10, generator=generator)
w = torch.randn(50, 35, 3, 3, generator=generator) / 17
for stride in (1, 2):
    def error(x, w):
        truth = torch.nn.functional.conv2d(x.double(), w.double(), stride=stride, padding=1)
        return float((frozen_conv2d(x, w, stride=stride) - truth).norm() / truth.norm())
    print(error(x, w), error(x.double(), w.double()), error(x.half(), w.half()), error(x.bfloat16(), w))
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets_agree_to_rounding(isa, run_with_isa):
    errors = run_with_isa(isa, COMPARE).split()
    assert len(errors) == 8
    for single, double, half, bf16 in (errors[:4], errors[4:]):
        assert float(single) < 2e-6
        assert float(double) < 2e-15 * 5
        assert float(half) < 1e-3
        assert float(bf16) < 2e-3


def test_filters_are_made_of_any_dtype():
    w = weight(4, 3, torch.bfloat16)
    assert frozen_filters(w).forward.dtype == torch.int16
    assert frozen_filters(w, torch.float64).forward.dtype == torch.float64
    assert frozen_filters(w, torch.float16).forward.dtype == torch.float32
    assert frozen_filters(w, torch.float32).forward.shape == (36, 1, 3, 16)
    assert frozen_filters(w, torch.float64).adjoint.shape == (36, 1, 4, 8)
    assert frozen_filters(w).forward.shape == (36, 1, 1 + 2, 32)  # three channels and one of zeros
    assert frozen_filters(weight(18, 3, torch.bfloat16)).adjoint.shape == (36, 1, 1 + 9, 32)
    assert frozen_filters(w, torch.float32, stride=2).forward.shape == (36, 1, 4 * 3, 16)
    assert frozen_filters(w, torch.float32, stride=2).adjoint.shape == (36, 1, 4, 16)


X, W = torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3)


@pytest.mark.parametrize(
    ("x", "filters", "error", "message"),
    [
        (None, W, TypeError, "x: expected a tensor, got NoneType"),
        (X, None, TypeError, "weight: expected a tensor, got NoneType"),
        (X.long(), W, TypeError, "x: expected float32, .*, got torch.int64"),
        (X, W.long(), TypeError, "weight: expected float32, .*, got torch.int64"),
        (X[0], W, ValueError, r"x: expected \[N, 3, H, W\].*, got shape \[3, 4, 4\]"),
        (X[:, :2], W, ValueError, r"x: expected \[N, 3, H, W\].*, got shape \[1, 2, 4, 4\]"),
        (X[:, :, :0], W, ValueError, r"x: expected .* with H, W >= 1, got shape \[1, 3, 0, 4\]"),
        (X, W[..., :2], ValueError, r"weight: expected \[K, C, 3, 3\] or .*, got shape \[2, 3, 3, 2\]"),
        (X, W[:0], ValueError, r"weight: expected \[K, C, 3, 3\] or .*, got shape \[0, 3, 3, 3\]"),
        (X, W.clone().requires_grad_(), ValueError, "weight: expected frozen filters, got .* requires a gradient"),
        (X.double(), frozen_filters(W), ValueError, "filters: expected torch.float64 for x in torch.float64"),
        (X, frozen_filters(W, torch.float64), ValueError, "filters: expected torch.float32 for x in torch.float32"),
        (X.bfloat16(), frozen_filters(W), ValueError, "filters: expected torch.int16 for x in torch.bfloat16"),
        (X.to("meta"), W, ValueError, "x: expected device cpu as the filters, got meta"),
    ],
)
def test_messages(x, filters, error, message):
    with pytest.raises(error, match=message):
        frozen_conv2d(x, filters)


@pytest.mark.parametrize(
    ("filters", "stride", "message"),
    [
        (W, 3, "stride: expected 1 or 2 for these taps, got 3"),
        (torch.ones(2, 3, 7, 7), 1, "stride: expected 2 for these taps, got 1"),
        (frozen_filters(W), 2, "stride: expected 1 as the filters, got 2"),
        (frozen_filters(W, stride=2), 1, "stride: expected 2 as the filters, got 1"),
    ],
)
def test_stride_messages(filters, stride, message):
    with pytest.raises(ValueError, match=message):
        frozen_conv2d(X, filters, stride=stride)
    if not isinstance(filters, FrozenFilters):
        with pytest.raises(ValueError, match=message):
            frozen_filters(filters, stride=stride)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 4)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
def test_five_taps(size, dtype, bound):
    """The registered operator alone takes them: what makes the filters is the caller's."""
    (x,), w = images(2, 17, *size)(dtype), weight(33, 17, dtype, taps=5)
    forward, adjoint = (_transformed(taps, dtype) for taps in (w, w.flip(2, 3).transpose(0, 1)))
    truth = F.conv2d(x.double(), w.double(), padding=2)
    assert relative_error(OP(x, forward, adjoint, 5, 2), truth) < bound


def test_filters_messages():
    with pytest.raises(TypeError, match=r"dtype: expected float32, .*, got torch.int16"):
        frozen_filters(W, torch.int16)


def test_direct_calls_are_checked_too():
    made, pairs = frozen_filters(W), frozen_filters(W.bfloat16())
    for args in (
        (X.bfloat16(), pairs.forward, pairs.adjoint, 3, 1),  # three channels
        (X[:, :2].bfloat16(), made.forward, made.adjoint, 3, 1),
        (X[:, :2].bfloat16(), pairs.forward[:, :, :, :16].contiguous(), pairs.adjoint, 3, 1),
        (X[:, :2], pairs.forward, pairs.adjoint, 3, 1),
        (X[0], made.forward, made.adjoint, 3, 1),
        (X[:, :2], made.forward, made.adjoint, 3, 1),
        (X, made.adjoint, made.forward, 3, 1),
        (X, made.forward, made.adjoint, 5, 1),
        (X.half(), made.forward, made.adjoint, 5, 2),
        (X, made.forward, made.adjoint, 3, 2),
        (X[:, :, :3], *frozen_filters(torch.ones(4, 3, 7, 7))[1:3], 4, 2),  # half a cell
        (X, made.forward, made.adjoint, 2, 1),  # filters of no cells
        (X, made.forward, made.adjoint, 4, 1),  # three channels, of no cells
        (X, made.forward[:35], made.adjoint, 3, 1),
        (X, made.forward.double(), made.adjoint, 3, 1),
        (X, made.forward, made.adjoint[0], 3, 1),
        (X.double(), made.forward, made.adjoint, 3, 1),
        (X[:, :, :0], made.forward, made.adjoint, 3, 1),
        (X, made.forward.transpose(0, 1).contiguous().transpose(0, 1), made.adjoint[:, :, :, :8], 3, 1),
    ):
        with pytest.raises(RuntimeError, match=r"(x|filters|adjoint|taps): expected"):
            OP(*args)


def test_vmap_over_filters_is_refused():
    forward, adjoint = (t[None].expand(2, *t.shape) for t in frozen_filters(W)[1:3])
    with pytest.raises(NotImplementedError, match="vmap over filters"):
        torch.func.vmap(lambda f, a: OP(X, f, a, 3, 1))(forward, adjoint)


def test_backends():
    torch.testing.assert_close(frozen_conv2d(X, W), frozen_conv2d(X, W, backend="reference"))
    torch.testing.assert_close(frozen_conv2d(X, frozen_filters(W), backend="cpu"), F.conv2d(X, W, padding=1))
    with pytest.raises(NotImplementedError, match="frozen_conv2d has no cuda kernel; it has reference, cpu"):
        frozen_conv2d(X, W, backend="cuda")
