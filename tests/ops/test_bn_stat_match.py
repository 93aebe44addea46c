"""The match of BatchNorm statistics against its definition: tables of cases under `check_op`, layouts, and messages."""

import pytest
import torch
from torch import nn

from pydistill import bn_stat_match, reference
from pydistill.ops import bn_match_forward, max_pool2d
from pydistill.testing import CHECKS, Case, assert_close, check_op

OPS = torch.ops.pydistill


def ours(x, mean, var, **options):
    return bn_stat_match(x, mean, var, **options).to(x.dtype)


def plain(x, mean, var, **options):
    return reference.bn_stat_match(x, mean, var, **options).to(x.dtype)


def frozen(weight, bias, mean, var):
    """A BatchNorm whose parameters and statistics are these tensors."""
    bn = nn.BatchNorm2d(len(mean)).eval()
    del bn.weight, bn.bias, bn.running_mean, bn.running_var
    bn.weight, bn.bias, bn.running_mean, bn.running_var = weight, bias, mean, var
    return bn


def fused(x, *rest, function=bn_match_forward, **options):
    """Output and loss as one vector, so that every derivative reaches both."""
    *residual, weight, bias, mean, var = rest
    options["residual"] = residual[0] if residual else None
    y, loss = function(x, frozen(weight, bias, mean, var.abs()), **options)
    return torch.cat([y.flatten(), 0.25 * loss.to(y.dtype).flatten()])


def fused_plain(x, *rest, **options):
    return fused(x, *rest, function=reference.bn_match_forward, **options)


def raw_calls(x, mean, var, **options):
    planes = x.detach().reshape(*x.shape[:2], -1).requires_grad_()
    like = torch.randn(planes.shape, dtype=x.dtype, requires_grad=True)
    scale, shift = torch.rand(2, x.shape[1], dtype=x.dtype).unbind()
    scale, shift = scale.clone().requires_grad_(), shift.clone().requires_grad_()
    grads = torch.randn(2, x.shape[1], dtype=x.dtype, requires_grad=True)
    kept = planes.detach().mean((0, 2))
    images = planes.detach()[..., None]  # a column
    *_, which, _ = OPS.bn_match_pool(images, scale.detach(), shift.detach(), True, 2, 1, 1)
    pooled = torch.randn(which.shape, dtype=x.dtype, requires_grad=True)
    return [
        (OPS.bn_match_pool.default, (images.clone().requires_grad_(), scale, shift, True, 2, 1, 1)),
        (OPS.bn_match_pool_backward.default, (pooled, grads, images, which, scale, shift, kept, True, 2, 1, 1)),
        (OPS.bn_stat_match.default, (planes, None, None, None, False)),
        (OPS.bn_stat_match.default, (planes, like, scale, shift, True)),
        (OPS.bn_stat_match_backward.default, (None, grads, planes, None, None, None, kept, False)),
        (OPS.bn_stat_match_backward.default, (like.detach(), grads, planes, like, scale, shift, kept, False)),
    ]


def arranged(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "slice":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x[:1].expand(x.shape) if layout == "expanded" else x


def tensors(shape, layout="dense", parameters=0, residual=False):
    """Activations of several means and sizes, statistics beside theirs, before them what a BatchNorm has."""

    def make(dtype):
        generator = torch.Generator().manual_seed(sum(shape))
        random = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        C = shape[1]
        column = (1, C, *(1 for _ in shape[2:]))
        x = random(*shape) * (1 + random(C).abs()).view(column) + 3 * random(C).view(column)
        made = [arranged(x, layout)]
        if residual:
            made.append(arranged(random(*shape), layout))
        made += [1 + 0.3 * random(C) for _ in range(parameters)]
        return tuple(t.to(dtype) for t in (*made, 2 * random(C), 0.5 + random(C).abs()))

    return make


OPTIONS = [{"w_mean": 0.3, "w_var": 11.0}, {"kind": "sq", "unbiased": True}]
# registers are 4 to 16 lanes, rows go in fours
CASES = [Case(f"{o} {s}", tensors((2, 5, 3, 3), s), o) for o in OPTIONS for s in ("dense", "channels_last")]
CASES += [Case(layout, tensors((3, 17, 2, 5), layout)) for layout in ("slice", "transposed", "expanded")]
CASES += [
    Case("x".join(map(str, s)), tensors(s)) for s in [(6, 4), (4, 3, 8), (2, 3, 2, 3, 2), (2, 1, 4, 4), (1, 33, 1, 2)]
]
CASES += [Case("channels_last_3d", tensors((2, 18, 2, 3, 2), "channels_last"))]

FUSED = [
    Case(f"relu={relu} residual={residual} {layout}", tensors((2, 9, 3, 4), layout, 2, residual), {"relu": relu})
    for relu, residual, layout in (
        (False, False, "channels_last"),
        (True, False, "dense"),
        (False, True, "slice"),
        (True, True, "channels_last"),
    )
]
POOLED = [  # in half precision, where rounding decides who wins: test_pooling_in_bands...
    Case(
        f"relu={relu} {pool} {layout}", tensors((2, 9, 7, 6), layout, 2), {"relu": relu, "pool": pool}, (torch.float32,)
    )
    for relu, pool, layout in (
        (True, (3, 2, 1), "channels_last"),
        (False, (2, 3, 0), "dense"),
        (True, (3, 1, 1), "slice"),
    )
]


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("opcheck", "compile")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("check", ["opcheck", "compile"])
@pytest.mark.parametrize("case", [CASES[3], CASES[8]], ids=lambda case: case.name)
def test_with_the_compiler(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("opcheck", "compile")])
@pytest.mark.parametrize("case", FUSED + POOLED, ids=lambda case: case.name)
def test_fused_matrix(case, check):
    check_op(fused, fused_plain, [case], checks=[check])


def test_fused_compiles():
    bn = nn.BatchNorm2d(5).eval()

    def step(x, residual):
        y, loss = bn_match_forward(x, bn, relu=True, residual=residual)
        return y.square().sum() + loss

    inputs = [t.requires_grad_() for t in torch.randn(2, 3, 5, 4, 4)]
    wanted = (*inputs, bn.weight, bn.bias)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    found, truth = (torch.autograd.grad(f(*inputs), wanted) for f in (compiled, step))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


# planes go in tiles of 2048 positions, rows in tiles of 128 of panels of 256 channels
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 2047), (2, 2, 2049), (3, 5, 127), (1, 20, 129), (2, 261, 3), (1, 513, 131)], ids=str
)
def test_partial_tiles(shape, layout):
    make = tensors((*shape, 1), layout, 2, True)
    check_op(fused, fused_plain, [Case("tiles", make, {"relu": True}, order=1)], checks=["values", "repeats"])


# 192 KiB of rows at a time, but as many rows as a window has; more rows than the windows see, and fewer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        ((3, 64, 50, 112), (3, 2, 1)),
        ((2, 5, 37, 29), (3, 2, 1)),
        ((2, 130, 41, 190), (3, 2, 1)),
        ((1, 300, 50, 90), (2, 3, 0)),
        ((2, 33, 30, 800), (5, 1, 2)),
        ((2, 1, 700, 150), (3, 3, 1)),
        ((1, 40, 16, 2000), (4, 7, 1)),
    ],
    ids=str,
)
def test_pooling_in_bands_is_one_operator_after_the_other(shape, pool, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    bn = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False)
    for values in (bn.running_mean, bn.weight, bn.bias):
        values.normal_(generator=generator)
    bn = bn.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

    def results(y, loss):
        grad = torch.sin(torch.arange(y.numel()) * 1.7).view_as(y).to(dtype)
        return y, loss, torch.autograd.grad((y.double() * grad).sum() + loss.double(), x)[0]

    y, loss, d_x = results(*bn_match_forward(x, bn, relu=True, pool=pool))
    between, between_loss = bn_match_forward(x, bn, relu=True)
    apart, apart_loss, apart_d_x = results(max_pool2d(between, *pool), between_loss)
    assert torch.equal(y, apart)
    torch.testing.assert_close(loss, apart_loss, rtol=1e-5, atol=1e-6)
    # sums are of other tiles: the part of the statistics may differ in its last bits
    torch.testing.assert_close(d_x, apart_d_x, rtol=2e-2 if d_x.element_size() == 2 else 1e-5, atol=1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert d_x.is_contiguous(memory_format=torch.channels_last)


def test_pooling_keeps_the_input_and_the_winners_only():
    bn = nn.BatchNorm2d(64).eval().requires_grad_(False)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, _ = bn_match_forward(x, bn, relu=True, pool=(3, 2, 1))
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.numel() > 200]
    assert [(t.data_ptr() == x.data_ptr(), t.dtype) for t in saved] == [(True, x.dtype), (False, torch.uint8)]
    assert saved[1].shape == y.shape


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(layout):
    x = arranged(1e4 + torch.randn(4, 8, 30, 30, dtype=torch.float64), layout).float()
    zero = torch.zeros(8)
    wide = x.double()
    for w_mean, w_var in ((1.0, 0.0), (0.0, 1.0)):
        options = {"w_mean": w_mean, "w_var": w_var}
        truth = reference.bn_stat_match(wide, zero.double(), zero.double(), **options)
        assert_close("loss", bn_stat_match(x, zero, zero, **options), truth, rtol=1e-6)


def test_the_gradient_of_a_zero_norm_is_zero():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    statistics = torch.ops.pydistill.bn_stat_match(x.detach().flatten(2), None, None, None, False)[1]
    for options in ({}, {"kind": "sq"}):
        (first,) = torch.autograd.grad(bn_stat_match(x, *statistics.unbind(), **options), x)
        assert torch.equal(first, torch.zeros_like(x))
    constant = torch.full((2, 3, 4, 4), 0.1, requires_grad=True)
    for layout in ("dense", "channels_last"):
        inputs = arranged(constant, layout)
        loss = bn_stat_match(inputs, torch.zeros(3), torch.zeros(3), w_mean=0.0)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, constant)[0], torch.zeros_like(constant))


def test_layouts_are_kept_and_inputs_are_not_copied():
    bn = nn.BatchNorm2d(64).eval().requires_grad_(False)
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 64, 8, 8).contiguous(memory_format=format).requires_grad_()
        y, loss = bn_match_forward(x, bn, relu=True)
        assert y.is_contiguous(memory_format=format)
        saved = [t for node in (y.grad_fn.next_functions[0][0],) for t in node.saved_tensors if t is not None]
        assert [t.data_ptr() for t in saved if t.numel() > 200] == [x.data_ptr()]
        assert torch.autograd.grad(loss + y.sum(), x)[0].is_contiguous(memory_format=format)


def test_a_gradient_of_another_layout():
    bn = nn.BatchNorm2d(20).eval().requires_grad_(False)
    x = torch.randn(2, 20, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 20, 6, 7)
    y, loss = bn_match_forward(x, bn, relu=True)
    other = torch.autograd.grad((y, loss), x, (grad, torch.ones(())), retain_graph=True)[0]
    same = torch.autograd.grad((y, loss), x, (grad.contiguous(memory_format=torch.channels_last), torch.ones(())))[0]
    assert torch.equal(other, same)


def test_agrees_with_batch_norm_and_relu():
    bn = nn.BatchNorm2d(6).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    x, residual = torch.randn(2, 2, 6, 9, 9)
    y, _ = bn_match_forward(x, bn, relu=True, residual=residual)
    torch.testing.assert_close(y, (bn(x) + residual).relu())
    plain_bn = nn.BatchNorm2d(6, affine=False).eval()
    torch.testing.assert_close(bn_match_forward(x, plain_bn)[0], plain_bn(x))


PROBE = """
import hashlib, torch, pydistill
from torch import nn
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for format in (torch.contiguous_format, torch.channels_last):
        bn = nn.BatchNorm2d(37).eval().requires_grad_(False)
        bn = bn.double() if dtype == torch.float64 else bn
        pair = torch.randn(2, 3, 37, 13, 11, dtype=torch.float64)
        x, r = (t.to(dtype).contiguous(memory_format=format).requires_grad_() for t in pair)
        y, loss = pydistill.ops.bn_match_forward(x, bn, relu=True, residual=r)
        grads = torch.autograd.grad((y.float().square().sum() + loss), (x, r))
        p, p_loss = pydistill.ops.bn_match_forward(x, bn, relu=True, pool=(3, 2, 1))
        grads += torch.autograd.grad((p.float().square().sum() + p_loss), x)
        for t in (y, loss, p, p_loss, *grads):
            digest.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_equal_bits_in_every_instruction_set(same_in_every_isa):
    same_in_every_isa(PROBE)


X, MEAN, VAR = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x: expected a tensor, got list", lambda: bn_stat_match([1.0], MEAN, VAR)),
        (TypeError, "x: expected float32, .* got torch.int64", lambda: bn_stat_match(X.long(), MEAN, VAR)),
        (ValueError, r"x: expected \[N, C, ...\], got shape \[3\]", lambda: bn_stat_match(MEAN, MEAN, VAR)),
        (ValueError, "x: expected at least 1 elements", lambda: bn_stat_match(X[:0], MEAN, VAR)),
        (ValueError, "x: expected at least 2", lambda: bn_stat_match(X[:1, :, :1, :1], MEAN, VAR, unbiased=True)),
        (ValueError, r"running_mean: expected \[3\] .*, got shape \[4\]", lambda: bn_stat_match(X, torch.ones(4), VAR)),
        (ValueError, r"running_var: expected \[3\]", lambda: bn_stat_match(X, MEAN, torch.ones(()))),
        (
            ValueError,
            "kind: expected 'norm' or 'sq', got 'mean'",
            lambda: bn_stat_match(X, MEAN, VAR, kind="mean"),
        ),
        (NotImplementedError, "backend='cuda' cannot run on cpu", lambda: bn_stat_match(X, MEAN, VAR, backend="cuda")),
        (ValueError, "bn: expected a BatchNorm in evaluation mode", lambda: bn_match_forward(X, nn.BatchNorm2d(3))),
        (
            TypeError,
            "bn: expected nn.BatchNorm1d, 2d or 3d, got GroupNorm",
            lambda: bn_match_forward(X, nn.GroupNorm(1, 3)),
        ),
        (
            ValueError,
            "bn: expected running statistics",
            lambda: bn_match_forward(X, nn.BatchNorm2d(3, track_running_stats=False).eval()),
        ),
        (ValueError, r"running_mean: expected \[3\]", lambda: bn_match_forward(X, nn.BatchNorm2d(4).eval())),
        (
            ValueError,
            "residual: expected .* as x",
            lambda: bn_match_forward(X, nn.BatchNorm2d(3).eval(), residual=X[:1]),
        ),
        (TypeError, "residual: expected a tensor", lambda: bn_match_forward(X, nn.BatchNorm2d(3).eval(), residual=1.0)),
        (
            ValueError,
            "pool: expected None with a residual",
            lambda: bn_match_forward(X, nn.BatchNorm2d(3).eval(), residual=X, pool=(3, 2, 1)),
        ),
        (TypeError, r"pool: expected \(kernel_size", lambda: bn_match_forward(X, nn.BatchNorm2d(3).eval(), pool=3)),
        (ValueError, "padding: expected 0 to 1", lambda: bn_match_forward(X, nn.BatchNorm2d(3).eval(), pool=(3, 2, 2))),
        (
            ValueError,
            r"x: expected \[N, C, H, W\]",
            lambda: bn_match_forward(X[..., 0], nn.BatchNorm1d(3).eval(), pool=(3, 2, 1)),
        ),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_direct_calls_of_the_pooled_form_are_checked_too():
    scale, shift, mean = torch.ones(3, 3).unbind()
    y, statistics, which, _ = OPS.bn_match_pool(X, scale, shift, True, 3, 2, 1)
    for args in ((X[0], scale, shift), (X[:0], scale, shift), (X, scale[:2], shift), (X, scale, shift.double())):
        with pytest.raises(RuntimeError, match=r"(x|scale|shift): expected"):
            OPS.bn_match_pool(*args, True, 3, 2, 1)
    good = (y, statistics, X, which, scale, shift, mean)
    for at, wrong in ((0, y[..., :1]), (0, y.double()), (1, statistics[0]), (3, which.float()), (3, which[:1]), (6, y)):
        with pytest.raises(RuntimeError, match=r"(grad_y|grad_statistics|which|mean): expected"):
            OPS.bn_match_pool_backward(*good[:at], wrong, *good[at + 1 :], True, 3, 2, 1)
