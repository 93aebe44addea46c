"""Gradients of a convolution in its filters by Winograd's tiles, against torch's in float64; the filters themselves."""

import pytest
import torch
import torch.nn.functional as F

from pydistill.ops._conv2d_winograd import conv2d_filters, conv2d_weight_grad
from pydistill.ops.frozen_conv2d import _transformed

OP = torch.ops.pydistill.conv2d_weight_grad.default


def relative_error(value, truth):
    return float((value.double() - truth).norm() / truth.norm())


def pair(N, C, K, H, W, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    planes = (torch.randn(N, channels, H, W, generator=generator, dtype=torch.float64) for channels in (C, K))
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in planes]


def exact(x, grad, taps):
    w = torch.zeros(grad.shape[1], x.shape[1], taps, taps, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x.double(), w, padding=taps // 2), w, grad.double())[0]


# tiles of 4x4 or 2x2, blocks of 64 by 64 or 32 channels, chunks of 24 tiles, slots of 96 tiles or more
SHAPES = [
    (2, 16, 16, 8, 8),
    (2, 17, 9, 7, 5),
    (1, 1, 1, 1, 1),
    (3, 5, 3, 1, 11),
    (9, 70, 140, 13, 9),
    (13, 33, 18, 16, 16),
]


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 4e-15)])
def test_gradient(shape, taps, dtype, bound):
    x, grad = pair(*shape, dtype)
    assert relative_error(OP(x, grad, None, None, taps), exact(x, grad, taps)) < bound


@pytest.mark.parametrize("taps", [3, 5])
def test_two_pairs_are_summed(taps):
    first, second = pair(3, 18, 33, 9, 8), pair(3, 18, 33, 9, 8, seed=1)
    truth = exact(*first, taps) + exact(*second, taps)
    assert relative_error(OP(*first, *second, taps), truth) < 4e-15


def test_layouts_and_no_images():
    x, grad = pair(2, 5, 7, 6, 4)
    truth = OP(x, grad, None, None, 3)
    wide = x.new_zeros(2, 6, 6, 8)
    wide[:, 1:, :, ::2] = x
    for other in (x.contiguous(), wide[:, 1:, :, ::2]):
        assert torch.equal(OP(other, grad.contiguous(), None, None, 3), truth)
    assert truth.is_contiguous()
    assert torch.equal(OP(x[:0], grad[:0], None, None, 3), torch.zeros_like(truth))


def test_threads_have_equal_bits():
    x, grad = pair(40, 40, 70, 16, 16, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(OP(x, grad, None, None, 3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


COMPARE = """
import torch
from pydistill.ops._conv2d_winograd import conv2d_weight_grad
generator = torch.Generator().manual_seed(1)
x, grad = (torch.randn(3, C, 9, 10, generator=generator) for C in (35, 50))
for taps in (3, 5):
    w = torch.zeros(50, 35, taps, taps, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x.double(), w, padding=taps // 2)
    (truth,) = torch.autograd.grad(y, w, grad.double())
    for dtype in (torch.float32, torch.float64):
        found = conv2d_weight_grad(x.to(dtype), grad.to(dtype), None, None, taps)
        print(float((found - truth).norm() / truth.norm()))
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets_agree_to_rounding(isa, run_with_isa):
    errors = run_with_isa(isa, COMPARE).split()
    assert len(errors) == 4
    assert all(float(error) < bound for error, bound in zip(errors, (2e-6, 4e-15) * 2, strict=True))


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters(taps, dtype, bound, memory_format):
    for K, C in ((16, 16), (17, 35), (1, 1), (40, 3)):
        w = torch.randn(K, C, taps, taps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w = w.to(dtype).contiguous(memory_format=memory_format)
        for turned, same in ((False, w), (True, w.flip(2, 3).transpose(0, 1))):
            found, truth = conv2d_filters(w, turned), _transformed(same, dtype)
            assert found.shape == truth.shape
            assert relative_error(found, truth.double()) < bound


def test_they_have_no_derivative():
    x, grad = pair(1, 2, 3, 4, 4)
    with pytest.raises(NotImplementedError, match="conv2d_weight_grad has no derivative"):
        conv2d_weight_grad(x.requires_grad_(), grad, None, None, 3).sum().backward()
    w = torch.ones(2, 3, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="conv2d_filters has no derivative"):
        conv2d_filters(w, False).sum().backward()


def test_arguments_are_checked():
    x, grad = pair(1, 2, 3, 4, 4)
    for args in (
        (x[0], grad, None, None, 3),
        (x, grad[0], None, None, 3),
        (x, grad, None, None, 4),
        (x, grad, x, None, 3),
        (x, grad, x, grad[:, :2], 3),
        (x, grad, x[:, :1], grad, 3),
        (x.half(), grad.half(), None, None, 3),
        (x, grad.float(), None, None, 3),
        (x, grad[:, :, :3], None, None, 3),
    ):
        with pytest.raises(RuntimeError, match=r"(x|grad|x_2|grad_2|taps): expected"):
            OP(*args)
    for weight in (x[0], x, torch.ones(2, 2, 3, 5), torch.ones(2, 2, 3, 3).half(), torch.ones(0, 2, 3, 3)):
        with pytest.raises(RuntimeError, match="weight: expected"):
            torch.ops.pydistill.conv2d_filters(weight, False)
