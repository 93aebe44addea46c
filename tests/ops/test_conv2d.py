"""The convolution with ordinary convolutions for its second derivative."""

import pytest
import torch
import torch.nn.functional as F

from pydistill.ops import conv2d
from pydistill.testing import Case, check_op


def tensors(x_shape, weight_shape, bias=True):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        shapes = [x_shape, weight_shape, *([weight_shape[:1]] if bias else [])]
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)

    return make


CASES = [
    Case("3x3", tensors((2, 3, 6, 5), (4, 3, 3, 3)), {"padding": 1}),
    Case("no bias, stride", tensors((2, 3, 7, 6), (4, 3, 3, 3), bias=False), {"stride": 2, "padding": (1, 0)}),
    Case("groups, dilation", tensors((2, 4, 7, 7), (6, 2, 3, 3)), {"dilation": 2, "groups": 2}),
    Case("pad 3", tensors((2, 1, 5, 5), (4, 1, 3, 3)), {"padding": 3}),
]


@pytest.mark.parametrize("check", ["values", "gradcheck", "func", "compile", "nan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(conv2d, F.conv2d, [case], checks=[check])


def test_third_derivative():
    x, weight, bias = (t.requires_grad_() for t in CASES[0].make(torch.float64))

    def third(f):
        out = f(x, weight, bias, padding=1).sin().sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
        return torch.autograd.grad(second.square().sum(), (x, weight, bias))

    torch.testing.assert_close(third(conv2d), third(F.conv2d), rtol=1e-9, atol=1e-9)


def test_gradients_nobody_asks_for_are_not_computed():
    x, weight, bias = CASES[0].make(torch.float32)
    weight.requires_grad_()
    out = conv2d(x, weight, bias, padding=1)
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(out.sum(), weight, create_graph=True)
    events = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    assert [e.concrete_inputs[-1] for e in events] == [[False, True, False]]
