"""The ConvNet block against its definition: a table of cases under `check_op`, and the messages for bad input."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pydistill import instance_norm_relu_avg_pool
from pydistill.testing import CHECKS, Case, check_op
from tests.kernels.block_problem import plain, raw_calls

OPS = torch.ops.pydistill


def images(shape, layout="nchw"):
    """x with planes of differing mean and scale, and affine parameters, in a layout."""

    def make(dtype):
        generator = torch.Generator().manual_seed(sum(shape))
        N, C, H, W = shape
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x * torch.linspace(0.5, 2, C, dtype=torch.float64).view(-1, 1, 1) + 0.3
        weight = torch.rand(C, generator=generator, dtype=torch.float64) + 0.5
        weight[::3] *= -1  # negative scales flip the ReLU's side
        bias = torch.randn(C, generator=generator, dtype=torch.float64) * 0.5
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "slice":  # neither dense nor aligned
            wide = torch.zeros(N, C + 1, H + 2, W + 3, dtype=dtype)
            wide[:, 1:, 1:-1, 2:-1] = x
            x = wide[:, 1:, 1:-1, 2:-1]
        elif layout == "transposed":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        elif layout == "expanded":
            x = x[:1].expand(N, C, H, W)
        return x, weight, bias

    return make


# lanes: 16 channels in float32, 8 in float64; blocks of 16 or 8 neighbouring positions in NCHW
CASES = [
    Case("nchw", images((2, 5, 6, 8))),
    Case("channels_last", images((2, 17, 6, 4), "channels_last")),
    Case("one channel", images((3, 1, 5, 7))),
    Case("15 channels, odd plane", images((2, 15, 7, 5), "channels_last")),
    Case("16 channels", images((1, 16, 4, 6), "channels_last")),
    Case("33 channels", images((2, 33, 3, 3))),
    Case("7 channels, primes", images((1, 7, 13, 11))),
    Case("8 channels", images((2, 8, 4, 4), "channels_last")),
    Case("9 channels", images((2, 9, 5, 4))),
    Case("smallest plane", images((6, 16, 2, 2))),
    Case("slice", images((2, 6, 6, 5), "slice")),
    Case("transposed", images((2, 6, 6, 5), "transposed")),
    Case("expanded", images((3, 6, 4, 5), "expanded")),
    Case("no pool", images((2, 5, 5, 4)), {"pool": False}),
    Case("no pool, channels_last", images((2, 18, 3, 4), "channels_last"), {"pool": False}),
    Case("no relu", images((2, 5, 5, 4), "channels_last"), {"relu": False}),
    Case("norm alone", images((2, 5, 3, 4)), {"relu": False, "pool": False}),
    Case("large eps", images((2, 3, 4, 4)), {"eps": 0.5}),
    Case("no samples", images((0, 3, 4, 4))),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(instance_norm_relu_avg_pool, plain, [case], raw_calls=functools.partial(raw_calls, OPS), checks=[check])


def test_layout_follows_the_input():
    x = torch.randn(2, 3, 6, 6)
    out = instance_norm_relu_avg_pool(x, torch.ones(3), torch.zeros(3))
    assert out.is_contiguous()
    out = instance_norm_relu_avg_pool(x.contiguous(memory_format=torch.channels_last), torch.ones(3), torch.zeros(3))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_large_planes_and_offsets_keep_their_digits():
    """A plane of 256x256 far from zero: sums in blocks, deviations from the mean before squaring."""
    x = torch.randn(1, 2, 256, 256, dtype=torch.float64) + 100
    weight, bias = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    truth = plain(x, weight, bias)
    ours = instance_norm_relu_avg_pool(x.float(), weight.float(), bias.float())
    torchs = plain(x.float(), weight.float(), bias.float())
    assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max()


def test_bfloat16_with_float32_parameters():
    x, weight, bias = images((2, 5, 6, 8))(torch.float64)
    out = instance_norm_relu_avg_pool(x.bfloat16(), weight.float(), bias.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), plain(x.bfloat16().double(), weight, bias), rtol=1e-2, atol=1e-2)


def test_compiled_by_inductor():
    x, weight, bias = (t.requires_grad_() for t in images((2, 5, 6, 8))(torch.float32))
    compiled = torch.compile(lambda *t: instance_norm_relu_avg_pool(*t).square(), fullgraph=True)
    out = compiled(x, weight, bias)
    torch.testing.assert_close(out, plain(x, weight, bias).square())
    out.sum().backward()
    (truth,) = torch.autograd.grad(plain(x, weight, bias).square().sum(), x)
    torch.testing.assert_close(x.grad, truth)


def test_third_derivative_is_refused():
    x, weight, bias = (t.requires_grad_() for t in images((1, 2, 4, 4))(torch.float64))
    (first,) = torch.autograd.grad(instance_norm_relu_avg_pool(x, weight, bias).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        torch.autograd.grad(second.square().sum(), x)


def test_second_derivative_beside_other_terms():
    """An opaque backward would drop terms here, without an error."""
    x, weight, bias = (t.requires_grad_() for t in images((1, 2, 4, 4))(torch.float64))

    def second(f):
        (first,) = torch.autograd.grad((f(x, weight, bias).square().sum() + (x**3).sum()), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(instance_norm_relu_avg_pool), second(plain), rtol=1e-10, atol=1e-10)


def test_direct_calls_have_gradients():
    """An operator of C++ without an autograd formula gives None, with no more than a warning."""
    tensors = [t.requires_grad_() for t in images((2, 3, 4, 4))(torch.float64)]
    grads = torch.autograd.grad(OPS.instance_norm_relu_avg_pool(*tensors, 1e-5, True, True).square().sum(), tensors)
    truth = torch.autograd.grad(plain(*tensors).square().sum(), tensors)
    torch.testing.assert_close(grads, truth)


ISA_SCRIPT = """
import torch, pydistill, hashlib
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 21, 9, 11, generator=generator).to(dtype).contiguous(memory_format=layout).requires_grad_()
        w, b = (torch.randn(21, generator=generator).to(dtype).requires_grad_() for _ in range(2))
        y = pydistill.instance_norm_relu_avg_pool(x, w, b)
        first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))
        for t in (y, *first, *second):
            digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


def test_unknown_instruction_set_is_refused():
    environment = os.environ | {"PYDISTILL_ISA": "sse9"}
    program = (
        "import torch, pydistill; pydistill.instance_norm_relu_avg_pool(torch.ones(1, 1, 2, 2), *torch.ones(2, 1))"
    )
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "PYDISTILL_ISA=sse9: expected base, avx2, avx512, avx512_bf16 or amx" in result.stderr


X, W, B = torch.randn(2, 3, 4, 4), torch.ones(3), torch.zeros(3)
BAD = [
    ((X[0], W, B), {}, ValueError, r"x: expected \[N, C, H, W\], got shape \[3, 4, 4\]"),
    ((X.int(), W, B), {}, TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int32"),
    (("x", W, B), {}, TypeError, "x: expected a tensor, got str"),
    ((X, torch.ones(4), B), {}, ValueError, r"weight: expected shape \[3\] for x \[2, 3, 4, 4\], got \[4\]"),
    ((X, W, torch.ones(3, 1)), {}, ValueError, r"bias: expected shape \[3\]"),
    ((X, W.to("meta"), B), {}, ValueError, "weight: expected device cpu as x, got meta"),
    ((X[..., :1], W, B), {}, ValueError, "x: expected planes of at least 2x2 with pool=True"),
    ((X[:, :, :0], W, B), {"pool": False}, ValueError, "x: expected planes of at least 1x1"),
    ((X, W, B), {"backend": "numpy"}, ValueError, "backend: expected one of auto, reference, cpu, cuda, triton"),
    ((X, W, B), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run on cpu tensors"),
    ((X, W, B), {"backend": "triton"}, NotImplementedError, "backend='triton' cannot run on cpu tensors"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        instance_norm_relu_avg_pool(*args, **options)


RAW_BAD = [
    ((X[0], W, B), r"x: expected \[N, C, H, W\], got 3 dimensions"),
    ((X, W.double(), B), "weight: expected float32"),
    ((X, torch.ones(6)[::2], B), r"weight: expected \[3\], contiguous"),
    ((X, W, torch.ones(2)), r"bias: expected \[3\]"),
    ((X[:, :, :1], W, B), "x: a 1x4 plane is too small"),
]


@pytest.mark.parametrize(("args", "message"), RAW_BAD)
def test_direct_calls_never_read_astray(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.instance_norm_relu_avg_pool(*args, 1e-5, True, True)
    with pytest.raises(RuntimeError, match="grad_y: expected size 2 in dimension 2, got 4"):
        OPS.instance_norm_relu_avg_pool_backward(X, X, W, B, 1e-5, True, True)


def test_reference_backend_is_the_reference():
    out = instance_norm_relu_avg_pool(X, W, B, backend="reference")
    torch.testing.assert_close(out, F.avg_pool2d(F.relu(F.group_norm(X, 3, W, B)), 2))


def test_meta_tensors_get_shapes():
    out = instance_norm_relu_avg_pool(X.to("meta"), W.to("meta"), B.to("meta"))
    assert out.shape == (2, 3, 2, 2)
    assert out.device.type == "meta"
