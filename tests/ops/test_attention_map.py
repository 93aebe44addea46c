"""The attention maps against their definition: cases under `check_op`, any order, and the messages."""

import pytest
import torch

from pydistill import reference
from pydistill.ops import attention_map
from pydistill.testing import CHECKS, Case, check_op
from tests.matrices import sample

OPS = torch.ops.pydistill


def joined(maps, dtype):
    """Both maps in one tensor of the features' dtype, which `check_op` expects."""
    return torch.cat(maps if isinstance(maps, tuple) else [maps], 1).to(dtype)


def ours(x, p, axis):
    return joined(attention_map(x, p, axis), x.dtype)


def plain(x, p, axis):
    return joined(reference.attention_map(x, p, axis), x.dtype)


def raw_calls(x, p, axis):
    """Both operators, with and without a factor."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, C, H, W = x.shape
    spatial = torch.randn(N, H * W, dtype=compute, requires_grad=True) if axis != "channel" else None
    channel = torch.randn(N, C, dtype=compute, requires_grad=True) if axis != "spatial" else None
    factor = torch.randn_like(x, requires_grad=True)
    wanted = (axis != "channel", axis != "spatial")
    return [
        (OPS.attention_map.default, (x, None, p, 0, *wanted)),
        (OPS.attention_map.default, (x, factor, p, 1, *wanted)),
        (OPS.attention_map_adjoint.default, (spatial, channel, x, None, p, 1)),
        (OPS.attention_map_adjoint.default, (spatial, channel, x, factor, p, 1)),
    ]


def feature_map(*shape, layout="dense"):
    """Away from zero, where the derivatives of odd powers jump."""

    def make(dtype):
        generator = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (x + 0.2 * x.sign()).to(dtype)
        if layout == "channels_last":
            return (x.to(memory_format=torch.channels_last),)
        if layout == "permuted":
            return (x.transpose(1, 3).contiguous().transpose(1, 3),)
        return (x[:1].expand(shape),) if layout == "expanded" else (x,)

    return make


# vectors of sixteen or eight elements, channels in blocks of sixteen
SHAPES = [(2, 1, 1, 1), (2, 3, 4, 4), (1, 16, 3, 5), (2, 17, 1, 17), (1, 15, 5, 3), (2, 33, 2, 8)]
CASES = [
    *(
        Case(f"{axis} {shape}", feature_map(*shape), {"p": 4.0, "axis": axis})
        for axis in ("spatial", "channel", "both")
        for shape in SHAPES
    ),
    *(Case(f"p={p}", feature_map(2, 5, 3, 4), {"p": p, "axis": "both"}) for p in (1.0, 2.0, 3.0, 2.5)),
    *(
        Case(layout, feature_map(2, 5, 3, 4, layout=layout), {"p": 4.0, "axis": "both"})
        for layout in ("channels_last", "permuted", "expanded")
    ),
    Case("no samples", feature_map(0, 5, 3, 4), {"p": 4.0, "axis": "both"}),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


@pytest.mark.parametrize("shape", [(64, 128, 32, 32), (3, 256, 56, 56)], ids=str)
@pytest.mark.parametrize("layout", sample(["dense", "channels_last"], ["channels_last"]))
def test_over_several_threads(shape, layout):
    case = Case("large", feature_map(*shape, layout=layout), {"p": 4.0, "axis": "both"}, dtypes=(torch.float32,))
    check_op(ours, plain, [case], checks=["values"])
    bits = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        bits.append(attention_map(*case.make(torch.float32), 4.0, "spatial"))
    assert all(torch.equal(each, bits[0]) for each in bits)


def test_third_derivatives():
    def third(f):
        (x,) = (t.requires_grad_() for t in feature_map(2, 3, 2, 2)(torch.float64))
        value = joined(f(x, 4.0, "both"), x.dtype).sin().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = (g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g)).sum()
        return torch.stack([value.detach(), g.norm().detach()])

    torch.testing.assert_close(third(attention_map), third(reference.attention_map), rtol=1e-11, atol=0)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 4.0])
def test_derivatives_are_zero_where_the_features_are(p):
    x = torch.tensor([0.0, 2.0, -3.0, 0.0]).view(1, 1, 2, 2).requires_grad_()
    (grad,) = torch.autograd.grad(attention_map(x, p).sum(), x)
    truth = p * x.detach().abs() ** (p - 1) * x.detach().sign()
    torch.testing.assert_close(grad, torch.where(x == 0, 0.0, truth))


def test_maps_of_half_precision_hold_what_it_could_not():
    x = torch.full((1, 8, 2, 2), 100.0, dtype=torch.float16)
    found = attention_map(x, 4.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 4), 8e8))


PRINT_BITS = """
import torch
from pydistill.ops import attention_map
x = torch.randn(3, 37, 9, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
for memory_format in (torch.contiguous_format, torch.channels_last):
    maps = attention_map(x.to(memory_format=memory_format), 4.0, "both")
    (grad,) = torch.autograd.grad(sum((m * m).sum() for m in maps), x)
    print([t.detach().contiguous().view(torch.int32).sum().item() for t in (*maps, grad)])
"""


def test_equal_bits_over_instruction_sets(same_in_every_isa):
    same_in_every_isa(PRINT_BITS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: attention_map([x]), TypeError, "x: expected a tensor, got list"),
        (lambda x: attention_map(x.long()), TypeError, "x: expected float32, .* got torch.int64"),
        (lambda x: attention_map(x[0]), ValueError, r"x: expected \[N, C, H, W\], got shape \[3, 4, 5\]"),
        (lambda x: attention_map(x, 0.0), ValueError, r"p: expected a finite number above zero, got 0\.0"),
        (lambda x: attention_map(x, -1.0), ValueError, r"p: expected a finite number above zero, got -1\.0"),
        (lambda x: attention_map(x, float("nan")), ValueError, "p: expected a finite number above zero, got nan"),
        (lambda x: attention_map(x, 2.0, "time"), ValueError, "axis: expected 'spatial', .*, got 'time'"),
        (lambda x: attention_map(x, backend="cuda"), NotImplementedError, "attention_map has no cuda kernel"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3, 4, 5))
