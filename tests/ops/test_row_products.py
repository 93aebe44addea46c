"""The rows' scalar products against their definition: cases under `check_op`, any order, and the messages."""

import pytest
import torch

from pydistill import reference
from pydistill.ops import row_products
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill


def ours(a, b, rows):
    """In the dtype of a, which `check_op` expects."""
    return row_products(a, b, rows).to(a.dtype)


def plain(a, b, rows):
    return reference.row_products(a, b, rows).to(a.dtype)


def raw_calls(a, b, rows):
    flat = [number for block in rows for number in block]
    grad = torch.randn(len(a), sum(count for _, count, _ in rows), 4, dtype=a.dtype, requires_grad=True)
    a_t, b_t = torch.randn_like(a, requires_grad=True), torch.randn_like(b, requires_grad=True)
    return [
        (OPS.row_products.default, (a, b, flat)),
        (OPS.row_products_backward.default, (grad, a, b, flat)),
        (OPS.row_products_jvp.default, (a, b, a_t, b_t, flat)),
    ]


def vectors(K, P, layout="dense"):
    def arranged(tensor):
        if layout == "slice":
            wide = tensor.new_zeros(2 * K, 3 * P + 1)
            wide[1::2, 1::3] = tensor
            return wide[1::2, 1::3]
        if layout == "columns":
            return tensor.t().contiguous().t()
        return tensor[:1].expand(K, P) if layout == "expanded" else tensor

    def make(dtype):
        generator = torch.Generator().manual_seed(K * P)
        a, b = torch.randn(2, K, P, generator=generator, dtype=torch.float64)
        return tuple(arranged(t.to(dtype)) for t in (a, a + 0.3 * b))

    return make


# vectors of sixteen or eight elements, runs of 1024; gaps before, between and after blocks, or none
LENGTHS = (7, 8, 15, 16, 17, 1023, 1024, 1025, 3001)
CASES = [
    Case("convnet", vectors(3, 75), {"rows": [(2, 4, 9), (40, 3, 10), (71, 1, 4)]}),
    Case("whole", vectors(2, 30), {"rows": [(0, 5, 6)]}),
    Case("one element", vectors(2, 3), {"rows": [(0, 3, 1)]}),
    *(Case(f"row of {n}", vectors(1, n + 1), {"rows": [(1, 1, n)]}) for n in LENGTHS),
    Case("no blocks' rows", vectors(2, 5), {"rows": [(1, 0, 3), (2, 1, 3)]}),
    Case("no vectors", vectors(0, 6), {"rows": [(0, 2, 3)]}),
    *(Case(kind, vectors(3, 20, kind), {"rows": [(1, 3, 5)]}) for kind in ("slice", "columns", "expanded")),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def test_rows_over_several_threads():
    rows = [(5, 300, 27), (9000, 60, 1152)]
    check_op(ours, plain, [Case("large", vectors(3, 80000), {"rows": rows})], checks=["values", "repeats"])


def test_no_rows():
    a = torch.ones(2, 5, requires_grad=True)
    found = row_products(a, a, [])
    assert found.shape == reference.row_products(a, a, []).shape == (2, 0, 4)
    assert torch.equal(torch.autograd.grad(found.sum(), a)[0], torch.zeros(2, 5))


def test_third_derivatives():
    """The family is closed: further derivatives are made of the same operators."""
    rows = [(1, 2, 3), (8, 1, 4)]

    def third(f):
        a, b = (t.requires_grad_() for t in vectors(2, 13)(torch.float64))
        value = f(a, b, rows)[..., 0].sin().sum() + f(a, b, rows).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, (a, b), create_graph=True)
            value = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in grads)
        return torch.stack([value.detach(), *(g.norm().detach() for g in grads)])

    torch.testing.assert_close(third(row_products), third(reference.row_products), rtol=1e-11, atol=0)


def test_products_are_float32_for_half_precision():
    a, b = (t.bfloat16() for t in vectors(2, 20)(torch.float64))
    found = row_products(a, b, [(0, 2, 10)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference.row_products(a.double(), b.double(), [(0, 2, 10)]).float())


def test_long_rows_are_summed_accurately():
    """Ten million elements of one sign: a plain float32 sum along the row would lose its last digits."""
    a = torch.full((1, 10_000_019), 0.1)
    found = row_products(a, a * 2, [(0, 1, a.shape[1])])[0, 0].double()
    truth = torch.tensor([2.0, 1.0, 4.0, 1.0], dtype=torch.float64) * a[0, 0].double() ** 2 * a.shape[1]
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)


PRINT_BITS = """
import torch
from pydistill import _host
from pydistill.ops import row_products
print(_host.isa())
generator = torch.Generator().manual_seed(1)
a, b = torch.randn(2, 2, 5000, generator=generator).requires_grad_().unbind()
rows = [(1, 30, 27), (900, 2, 1500), (4001, 1, 17)]
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x, y = (t.detach().to(dtype).requires_grad_() for t in (a, b))
    out = row_products(x, y, rows)
    grads = torch.autograd.grad(out.sin().sum(), (x, y), create_graph=True)
    second = torch.autograd.grad(sum(g.float().sin().sum() for g in grads), (x, y))
    print([t.double().sum(dtype=torch.float64).item() for t in (out, *grads, *second)])
    print([hash(t.detach().double().numpy().tobytes()) for t in (out, *grads, *second)])
"""


def test_instruction_sets_agree_bitwise(same_with_every_isa):
    same_with_every_isa(PRINT_BITS, PYTHONHASHSEED="0")


@pytest.mark.parametrize(
    ("a", "b", "rows", "error", "message"),
    [
        (None, torch.ones(1, 2), [], TypeError, "a: expected a tensor, got NoneType"),
        (torch.ones(1, 2).long(), torch.ones(1, 2), [], TypeError, "a: expected float32, .*, got torch.int64"),
        (torch.ones(2), torch.ones(2), [], ValueError, r"a: expected \[K, P\], got shape \[2\]"),
        (torch.ones(1, 2), torch.ones(1, 3), [], ValueError, r"b: expected .*\[1, 2\] .* as a, got .*\[1, 3\]"),
        (torch.ones(1, 2), torch.ones(1, 2).double(), [], ValueError, "b: expected .*float32.* as a, got .*float64"),
        (torch.ones(1, 9), torch.ones(1, 9), [(0, 2, 5)], ValueError, r"rows: .* within 9 elements, got \(0, 2, 5\)"),
        (torch.ones(1, 9), torch.ones(1, 9), [(0, 2, 3), (5, 1, 1)], ValueError, r"got \(5, 1, 1\) behind element 6"),
        (torch.ones(1, 9), torch.ones(1, 9), [(0, -1, 3)], ValueError, r"rows: .*none negative, got \(0, -1, 3\)"),
        (torch.ones(1, 9), torch.ones(1, 9), [(0, 3)], ValueError, r"rows: expected \(start, count, length\)"),
    ],
)
def test_messages(a, b, rows, error, message):
    with pytest.raises(error, match=message):
        row_products(a, b, rows)


def test_direct_calls_are_checked_too():
    a = torch.ones(1, 9)
    for args in ((a, a, [0, 2, 5]), (a, a, [0, 1]), (a, a.double(), [0, 1, 9]), (a, a[:, :3], [0, 1, 3])):
        with pytest.raises(RuntimeError, match=r"rows: expected|b: expected"):
            OPS.row_products(*args)
    with pytest.raises(RuntimeError, match=r"grad: expected \[1, 1, 4\]"):
        OPS.row_products_backward(a.new_ones(1, 2, 4), a, a, [0, 1, 9])


def test_backends():
    a = torch.ones(1, 4)
    assert torch.equal(row_products(a, a, [(0, 1, 4)], backend="reference"), row_products(a, a, [(0, 1, 4)]))
    with pytest.raises(NotImplementedError, match="row_products has no cuda kernel; it has reference, cpu, triton"):
        row_products(a, a, [(0, 1, 4)], backend="cuda")
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run on cpu tensors"):
        row_products(a, a, [(0, 1, 4)], backend="triton")
