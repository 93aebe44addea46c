"""The checks are checked: each catches the fault that it is meant for."""

import pytest
import torch

from pydistill.testing import Case, assert_close, check_op


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype),)


CASE = Case("cube", make)


def cube(x):
    return x**3


class Opaque(torch.autograd.Function):
    """A backward made of numbers: right once, and silently without its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0].detach() ** 2


class ZeroSmall(torch.autograd.Function):
    """A backward that loses gradients where they are small."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        out = grad * 3 * x**2
        return torch.where(out.abs() < 0.05, 0 * out, out)


@pytest.mark.parametrize("checks", [["values"], ["gradcheck"], ["func"], ["compile"], ["repeats"], ["nan"]])
def test_a_right_operator_passes(checks):
    check_op(cube, cube, [CASE], checks=checks)


@pytest.mark.parametrize(
    ("op", "check"),
    [
        (lambda x: x**3 + 1e-3, "values"),
        (Opaque.apply, "values"),
        (Opaque.apply, "gradcheck"),
        (Opaque.apply, "func"),
        (ZeroSmall.apply, "values"),
        (ZeroSmall.apply, "func"),
        (lambda x: x**3 + torch.rand(()) * 1e-4, "repeats"),
        (lambda x: x.nan_to_num() ** 3, "nan"),
        (lambda x: x**3 if float(x.sum()) else x, "compile"),
    ],
)
def test_a_faulty_operator_fails(op, check):
    with pytest.raises(AssertionError, match=f"{check} on cube"):
        check_op(op, cube, [CASE], checks=[check])


def test_a_reference_that_overflows_is_named():
    def sigmoid(x):
        return x.exp() / (x.exp() + 1)

    large = Case("large", lambda dtype: (torch.tensor([12.0], dtype=dtype),), dtypes=(torch.float16,))
    with pytest.raises(AssertionError, match="float16 output: the reference's is NaN in this precision"):
        check_op(lambda x: sigmoid(x.double()).to(x.dtype), sigmoid, [large], checks=["values"])


def test_a_lost_value_is_found_within_tolerance():
    truth = torch.tensor([1.0, 1e-3])
    with pytest.raises(AssertionError, match="1 values are zero and should not be"):
        assert_close("gradient", torch.tensor([1.0, 0.0]), truth, plain=truth + torch.tensor([0.0, 6e-4]))
