"""The Triton kernels of bn_stat_match in Triton's interpreter, against plain torch and the CPU's operators.

Not collected by itself: `test_bn_stat_match_triton.py` runs this file in a process of its own, because the interpreter
has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pydistill import bn_stat_match, reference
from pydistill.ops import bn_match_forward
from pydistill.testing import assert_close

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# tiles are of 1024 elements: positions of one channel, or 32 channels and 32 positions
SHAPES = [(2, 5, 3, 3), (1, 2, 32, 33), (2, 33, 1, 33), (1, 1, 1, 1), (9, 2, 1, 1)]
PROBLEMS = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], dtype) for dtype in DTYPES[1:]]


def tensors(shape: tuple, layout: torch.memory_format, dtype: torch.dtype) -> list[Tensor]:
    made = 3 + 2 * torch.randn(2, *shape, dtype=torch.float64)
    return [t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in made]


def batch_norm(C: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(C).eval().requires_grad_(False).double()
    for values in (bn.running_mean, bn.weight, bn.bias):
        values.normal_()
    bn.running_var.uniform_(0.5, 2)
    return bn if dtype == torch.float64 else bn.float()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("shape", "dtype"), PROBLEMS, ids=str)
def test_against_plain_torch(shape: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    floor = 16 * torch.finfo(dtype).eps
    for relu, has_residual in ((False, False), (True, False), (True, True)):
        x, residual = tensors(shape, layout, dtype)
        bn = batch_norm(shape[1], dtype)
        weights = torch.randn(shape, dtype=torch.float64).to(dtype)

        def run(function: object, *inputs: Tensor, bn: nn.Module = bn, **options: object) -> list[Tensor]:
            summand = inputs[1] if len(inputs) > 1 else None
            y, loss = function(inputs[0], bn, relu=relu, residual=summand, **options)  # noqa: B023
            return [y, loss, *torch.autograd.grad((y, loss), inputs, (weights.to(y.dtype), torch.ones_like(loss)))]  # noqa: B023

        inputs = (x, residual) if has_residual else (x,)
        wide = tuple(t.detach().double().requires_grad_() for t in inputs)
        truth = run(reference.bn_match_forward, *wide, bn=_double(bn))
        plain = run(reference.bn_match_forward, *inputs)
        found = run(bn_match_forward, *inputs, backend="triton")
        for name, a, t, p in zip(("y", "loss", "grad_x", "grad_residual"), found, truth, plain, strict=False):
            assert_close(name, a, t, p, rtol=floor)
        assert found[0].is_contiguous(memory_format=layout)


def _double(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    wide = nn.BatchNorm2d(bn.num_features).eval().requires_grad_(False).double()
    wide.load_state_dict(bn.state_dict())
    return wide


def test_statistics_alone_and_layouts_of_others() -> None:
    x = torch.randn(3, 7, 9, 8, dtype=torch.float64)[..., ::2].requires_grad_()
    mean, var = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for options in ({}, {"kind": "sq", "unbiased": True, "w_var": 3.0}):
        found = bn_stat_match(x, mean, var, backend="triton", **options)
        truth = reference.bn_stat_match(x, mean, var, **options)
        assert_close("loss", found, truth, rtol=1e-12)
        pair = (torch.autograd.grad(loss, x)[0] for loss in (found, truth))
        assert_close("gradient", *pair, rtol=1e-12)


def test_nothing_is_written_outside() -> None:
    """Outputs amid guard cells."""
    from pydistill.triton import bn_stat_match as kernels

    for N, C, P, last in ((2, 5, 37, False), (2, 5, 37, True)):

        def planes(last: bool = last, shape: tuple = (N, C, P)) -> tuple[Tensor, Tensor]:
            N, C, P = shape
            memory = torch.full((N * C * P + 256,), 7.0)
            view = memory[128:-128]
            return memory, view.view(N, P, C).transpose(1, 2) if last else view.view(N, C, P)

        def vectors(rows: int, C: int = C) -> tuple[Tensor, Tensor]:
            memory = torch.full((rows * C + 256,), 7.0)
            return memory, memory[128:-128].view(rows, C)

        held = [planes(), vectors(2), vectors(1), planes(), planes()]
        y, statistics, kept, grad_x, grad_residual = (view for _, view in held)
        x, residual, grad_y = (planes()[1].normal_() for _ in range(3))
        scale, shift, mean = torch.rand(3, C)
        kernels.forward((y, statistics, kept[0]), x, residual, scale, shift, True)
        kernels.backward((grad_x, grad_residual), grad_y, torch.randn(2, C), x, residual, scale, shift, mean, True)
        for memory, view in held:
            assert (memory[:128] == 7).all()
            assert (memory[-128:] == 7).all()
            assert not (view == 7).any()


def test_nan_stays() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = torch.nan
    y, loss = bn_match_forward(x, nn.BatchNorm2d(3).eval(), relu=True, backend="triton")
    assert torch.equal(y.isnan(), x.isnan())
    assert loss.isnan()
