"""The Gram form of the discrepancy against the cube that defines it, and the messages."""

import pytest
import torch

from pydistill.matching import mmd
from pydistill.reference.mmd import mmd as reference
from tests.repeats import check_from_run_to_run


def samples(n=7, m=5, d=4, dtype=torch.float64, shift=0.7):
    generator = torch.Generator().manual_seed(n * m + d)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    return [t.to(dtype).requires_grad_() for t in (x + 3, y + 3 + shift)]


def with_gradients(function, x, y, **options):
    loss = function(x, y, **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def relative_error(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


OPTIONS = [
    {},
    {"kernels": 1},
    {"kernels": 2},
    {"kernels": 4, "factor": 1.7},
    {"bandwidth": 2.5},
    {"bandwidth": torch.tensor(2.5, dtype=torch.float64), "factor": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(7, 5, 4), (6, 6, 1), (1, 3, 2), (1, 1, 3)], ids=str)
def test_is_its_cube(sizes, options):
    x, y = samples(*sizes)
    for found, truth in zip(
        with_gradients(mmd, x, y, **options), with_gradients(reference, x, y, **options), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
        assert truth.norm() > 0


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_gradcheck_to_the_second_order(options):
    # the bandwidth is a constant of the derivative, so finite differences need one that is given
    options = {"bandwidth": 3.0, **options}
    x, y = samples(4, 3, 2)
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, **options), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: mmd(x, y, **options), (x, y))


def test_second_derivatives_are_the_references():
    def second(function):
        x, y = samples()
        grads = torch.autograd.grad(function(x, y), (x, y), create_graph=True)
        return torch.autograd.grad(sum(g.exp().sum() for g in grads), (x, y))

    for found, truth in zip(second(mmd), second(reference), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def test_func_and_compile():
    x, y = (t.detach() for t in samples())
    expected = with_gradients(reference, x.requires_grad_(), y.requires_grad_())[1:]
    of_func = torch.func.grad(mmd, (0, 1))(x.detach(), y.detach())
    compiled = with_gradients(torch.compile(mmd, fullgraph=True, backend="aot_eager"), x, y)[1:]
    for found in (of_func, compiled):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "d", "offset"), [(64, 512, 0.0), (40, 2048, 0.0), (100, 100, 0.0), (64, 128, 100.0)])
def test_float32_is_about_as_exact_as_the_cube(n, d, offset):
    """At most twice the cube's error, or some roundings, wherever the features lie."""
    x, y = samples(n, n, d, torch.float32, shift=0.1)
    x, y = ((t.detach().relu() + offset).requires_grad_() for t in (x, y))
    truth = with_gradients(reference, *(t.detach().double().requires_grad_() for t in (x, y)))
    found = zip(with_gradients(mmd, x, y), with_gradients(reference, x, y), truth, strict=True)
    eps = torch.finfo(torch.float32).eps
    for i, (value, plain, true) in enumerate(found):
        # the loss is the difference of means of five kernels of at most 1: it has their roundings
        floor = 4 * eps if i else 2 * 5 * eps / float(true)
        assert relative_error(value, true) <= max(2 * relative_error(plain, true), floor)


def test_equal_rows_are_at_no_distance():
    x = torch.randn(50, 300).requires_grad_()
    assert mmd(x, x.detach().clone(), kernels=3, bandwidth=1e-3).abs() < 1e-6  # any distance would count
    assert mmd(x[:1], x[1:2].detach(), bandwidth=1e-4) == 10  # each row itself, under five kernels, twice
    for value in (1.0, 0.1, 0.0, 1e4):
        equal = torch.full((3, 7), value).requires_grad_()  # their rounded mean may be another number
        for other in (equal.detach()[:2], equal.detach()[:1]):
            for f in (mmd, reference):
                loss = f(equal, other)
                assert loss == 0
                assert (torch.autograd.grad(loss, equal)[0] == 0).all()


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e-3, 1e4, 1e25])
def test_any_unit_of_the_features_will_do(size):
    """The loss does not depend on it, although squares may overflow; its gradient is in 1 / unit."""
    x, y = (t.detach() for t in samples(9, 7, 5, torch.float32))
    leaf = (size * x).requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    loss, truth = mmd(leaf, size * y), reference(wide, (size * y).double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    if size > 1e-30:  # otherwise it overflows float32
        found, true = (size * torch.autograd.grad(loss, leaf)[0], size * torch.autograd.grad(truth, wide)[0])
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-5)
    if 1e-15 < size < 1e15:  # otherwise the width overflows or underflows in float32
        loss, truth = (
            f(*rows, bandwidth=3 * size**2)
            for f, rows in ((mmd, (leaf, size * y)), (reference, (wide, (size * y).double())))
        )
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    x, y = samples(20, 30, 64, dtype)
    wide = [t.detach().float().requires_grad_() for t in (x, y)]
    found, truth = with_gradients(mmd, x, y), with_gradients(mmd, *wide)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], truth[0])
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[1:], truth[1:], strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd(x, y), truth[0])


def test_equal_bits_from_run_to_run():
    x, y = samples(256, 256, 512, torch.float32)
    check_from_run_to_run(lambda: with_gradients(mmd, x, y))


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        ([1.0], X, {}, TypeError, "x: expected a tensor, got list"),
        (X, X.int(), {}, TypeError, "y: expected float32, float64, bfloat16 or float16, got torch.int32"),
        (X[0], X, {}, ValueError, r"x: expected \[rows, d\] with at least one element, got \[3\]"),
        (X, X[:0], {}, ValueError, r"y: expected \[rows, d\] with at least one element, got \[0, 3\]"),
        (X, X[:, 1:], {}, ValueError, r"y: expected torch.float32 \[m, 3\] on cpu as x, got torch.float32 \[4, 2\]"),
        (X, X.double(), {}, ValueError, "y: expected torch.float32 .*, got torch.float64"),
        (X, X, {"kernels": 0}, ValueError, "kernels: expected a whole number of at least 1, got 0"),
        (X, X, {"kernels": 2.0}, ValueError, r"kernels: expected a whole number of at least 1, got 2\.0"),
        (X, X, {"factor": 1.0}, ValueError, r"factor: expected a finite number greater than 1, got 1\.0"),
        (X, X, {"bandwidth": 0.0}, ValueError, r"bandwidth: expected a positive finite number, got 0\.0"),
        (X, X, {"bandwidth": torch.ones(2)}, ValueError, r"bandwidth: expected a constant scalar, got shape \[2\]"),
    ],
)
def test_bad_input_is_named(x, y, options, error, message):
    with pytest.raises(error, match=message):
        mmd(x, y, **options)
