"""The loss on the stored form of soft labels against the densified one, under `check_op`; and the messages."""

import pytest
import torch

from pydistill import kd_divergence, reference
from pydistill.ops import sparse_label_loss
from pydistill.ops.sparse_label_loss import TAILS
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill


def ours(logits, *, indices, values, **options):
    return sparse_label_loss(logits, indices, values, **options)


def plain(logits, *, indices, values, **options):
    return reference.sparse_label_loss(logits, indices, values, **options)


def raw_calls(logits, *, indices, values, tail="smooth", step=None, **_):
    if step is None:
        values = values.to(logits.dtype)
    tensors, options = (indices.long(), values), (2.0, TAILS.index(tail), step or 0.0, True, 4.0)
    still = (torch.randn(len(logits), dtype=logits.dtype), logits.detach(), *tensors)
    return [
        (OPS.sparse_label_loss.default, (logits, *tensors, *options, True)),
        (OPS.sparse_label_loss.default, (logits, *tensors, *options, False)),
        (OPS.sparse_label_loss_backward.default, (*still, *options)),
    ]


def stored(N, C, k, codes=False):
    """Distinct classes in any order, and 128ths, which bfloat16 has, whose sum is below one; or codes."""
    generator = torch.Generator().manual_seed(N * C + k)
    indices = torch.rand(N, C, generator=generator).argsort(1)[:, :k]
    if codes:
        return indices, torch.randint(20, 256, (N, k), generator=generator, dtype=torch.uint8)
    values = torch.randint(0, max(2, 100 // k), (N, k), generator=generator) / 128
    values[:, 0] = 1 / 128  # no row without mass
    return indices, values


def rows(N, C, k, *, codes=False, layout="dense", **options):
    def make(dtype):
        logits = 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(N * C), dtype=torch.float64)
        logits = logits.to(dtype)
        if layout == "transposed":
            return (logits.t().contiguous().t(),)
        return (logits[:1].expand(N, C) if layout == "expanded" else logits,)

    indices, values = stored(N, C, k, codes)
    if codes:
        options["step"] = 0.04
    return make, {"indices": indices, "values": values, "T": 2.0, "reduction": "none", **options}


def case(name, N, C, k, **options):
    return Case(name, *rows(N, C, k, **options), order=1)


CASES = [case(f"{tail} {kind}", 4, 19, 5, tail=tail, kind=kind) for tail in TAILS for kind in ("kl", "ce")]
CASES += [case(f"{tail} codes", 4, 19, 5, tail=tail, codes=True) for tail in TAILS]
CASES += [case(f"{N}x{C}, {k}", N, C, k) for N, C, k in ((3, 1, 1), (2, 16, 16), (2, 17, 1), (2, 1009, 10), (0, 7, 2))]
CASES += [case(layout, 3, 11, 4, layout=layout) for layout in ("transposed", "expanded")]
CASES += [
    case("batchmean, T^2", 5, 12, 3, reduction="batchmean", scale_T2=True),
    case("sum", 5, 12, 3, reduction="sum"),
]
QUICK = [each for each in CASES if each.name in ("smooth kl", "smooth codes", "2x16, 16", "0x7, 2", "batchmean, T^2")]


@pytest.mark.parametrize("check", ["values", "gradcheck", "nan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("values", "gradcheck", "nan")])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_rest_of_the_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def test_rows_over_several_threads():
    check_op(ours, plain, [case("threads", 3000, 13, 4)], checks=["values", "repeats"])


@pytest.mark.parametrize("codes", [False, True], ids=["values", "codes"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_the_densified_loss_to_one_in_a_million(tail, codes, T):
    """A thousand classes, ten of them stored, in float32: loss and gradient against the dense ones."""
    logits = (4 * torch.randn(64, 1000)).requires_grad_()
    probabilities, indices = (3 * torch.randn(64, 1000) / T).softmax(1).topk(10)
    step, values = None, probabilities.half()
    if codes:
        step = 0.05
        values = (-probabilities.log() / step).round().clamp(0, 255).to(torch.uint8)
    exact = torch.exp(-step * values.double()) if codes else values.double()
    target = reference.densify(indices, exact, 1000, tail)
    torch.testing.assert_close(target.sum(1) <= 1 + 1e-2, torch.ones(64, dtype=torch.bool))
    for kind, dense in (("kl", "fkl"), ("ce", "soft_ce")):
        loss = sparse_label_loss(logits, indices, values, T=T, tail=tail, step=step, kind=kind)
        options = {"kind": dense, "T": T, "target_is": "probs", "scale_T2": False}
        truth = kd_divergence(logits.double(), target, **options)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss, kd_divergence(logits, target.float(), **options), rtol=1e-6, atol=1e-6)
        actual, expected = (torch.autograd.grad(each, logits)[0] for each in (loss, truth))
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_whole_distributions():
    """Every class stored: no tail is left, whichever way it is treated."""
    logits, target = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64).softmax(1)
    values, indices = target.sort(1)
    truth = kd_divergence(logits, target, target_is="probs")
    for tail in TAILS:
        torch.testing.assert_close(sparse_label_loss(logits, indices, values, tail=tail), truth)


def test_sums_above_one_leave_nothing_for_the_others():
    """As rounded to 16 or 8 bits."""
    values = torch.tensor([[0.7, 0.305]], dtype=torch.float64)
    logits, indices = torch.randn(1, 5, dtype=torch.float64), torch.tensor([[3, 0]])
    smooth, zeros = (sparse_label_loss(logits, indices, values, tail=tail) for tail in ("smooth", "zeros"))
    assert torch.equal(smooth, zeros)


def test_masked_classes():
    """-inf where the target has no mass; where it has some, the divergence is infinite."""
    logits = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]], requires_grad=True)
    indices, values = torch.tensor([[2, 0, 1]]), torch.tensor([[0.75, 0.25, 0.0]])
    loss = sparse_label_loss(logits, indices, values, tail="zeros")
    kept = logits[:, [2, 0]].detach().requires_grad_()
    truth = kd_divergence(kept, values[:, :2], target_is="probs")
    torch.testing.assert_close(loss, truth)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad[:, [2, 0]], torch.autograd.grad(truth, kept)[0])
    assert not grad[:, [1, 3]].any()
    assert sparse_label_loss(logits, indices[:, :2], values[:, :2] / 2) == torch.inf


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.uint16], ids=str)
def test_narrow_class_numbers(dtype):
    logits = torch.randn(3, 40)
    indices, values = stored(3, 40, 4)
    assert torch.equal(sparse_label_loss(logits, indices.to(dtype), values), sparse_label_loss(logits, indices, values))


def test_a_graph_can_be_gone_through_again():
    x = torch.randn(3, 19, dtype=torch.float64, requires_grad=True)
    indices, values = stored(3, 19, 5)
    loss = sparse_label_loss(x, indices, values, reduction="sum")
    grads = [torch.autograd.grad(loss, x, 3 * torch.ones_like(loss), retain_graph=True)[0].clone() for _ in range(3)]
    truth = torch.autograd.grad(reference.sparse_label_loss(x, indices, values, reduction="sum"), x)[0]
    for grad in grads:
        torch.testing.assert_close(grad, 3 * truth)


ISA_SCRIPT = """
import torch, pydistill, hashlib
from pydistill import labels
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for C in (3, 10, 203):
        for tail in ("smooth", "zeros", "renorm"):
            for step in (None, 0.04):
                x = (5 * torch.randn(7, C, generator=generator)).to(dtype).requires_grad_()
                indices = torch.rand(7, C, generator=generator).argsort(1)[:, :3]
                values = torch.rand(7, 3, generator=generator) / 3
                if step:
                    values = (255 * values).to(torch.uint8) + 20
                else:  # a stored class that takes no part
                    with torch.no_grad():
                        x[6, indices[6, 2]] = -torch.inf
                    values[6, 2] = 0
                loss = labels.sparse_label_loss(x, indices, values, T=3.0, tail=tail, step=step, reduction="none")
                for t in (loss, *torch.autograd.grad(loss.square().sum(), x)):
                    digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


X, INDEX, V = torch.randn(2, 4), torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 0.25], [0.5, 0.5]])
CODES = (20 * V).to(torch.uint8)
BAD = [
    (("x", INDEX, V), {}, TypeError, "logits: expected a tensor, got str"),
    ((X, [[0]], V), {}, TypeError, "indices: expected a tensor, got list"),
    ((X, INDEX.float(), V), {}, TypeError, "indices: expected integers, got torch.float32"),
    ((X, INDEX, INDEX), {}, TypeError, "values: expected float32, .* got torch.int64"),
    ((X, INDEX, CODES), {}, ValueError, "step: expected that of the codes in values, which are uint8, got None"),
    ((X, INDEX, V), {"step": 0.1}, TypeError, "values: expected uint8 codes where a step is given, got torch.float32"),
    ((X, INDEX, CODES), {"step": 0.0}, ValueError, "step: expected a positive number, got 0.0"),
    ((X[0], INDEX, V), {}, ValueError, r"logits: expected \[N, C\] with at least one class, got shape \[4\]"),
    ((X, INDEX[:1], V), {}, ValueError, r"indices: expected \[2, k\] with k in 1\.\.4 for 4 classes, got \[1, 2\]"),
    ((X, INDEX[:, :0], V), {}, ValueError, r"indices: expected \[2, k\] with k in 1\.\.4 for 4 classes, got \[2, 0\]"),
    ((X[:, :1], INDEX, V), {}, ValueError, r"indices: expected \[2, k\] with k in 1\.\.1 for 1 classes, got \[2, 2\]"),
    ((X, INDEX, V[:, :1]), {}, ValueError, r"values: expected shape \[2, 2\] as indices, got \[2, 1\]"),
    ((X, INDEX + 1, V), {}, ValueError, r"indices: expected class numbers in 0\.\.3 for 4 classes, got 4"),
    ((X, INDEX - 1, V), {}, ValueError, r"indices: expected class numbers in 0\.\.3 for 4 classes, got -1"),
    ((X, INDEX, 2 * V), {}, ValueError, "values: expected probabilities, .* got a sum of 2"),
    ((X, INDEX, V.clone().requires_grad_()), {}, ValueError, "values: expected a teacher without gradient"),
    ((X, INDEX, V.to("meta")), {}, ValueError, "values: expected device cpu as logits, got meta"),
    ((X, INDEX, V), {"T": 0.0}, ValueError, "T: expected a positive number, got 0.0"),
    ((X, INDEX, V), {"tail": "none"}, ValueError, "tail: expected 'smooth', 'zeros' or 'renorm', got 'none'"),
    ((X, INDEX, V), {"kind": "fkl"}, ValueError, "kind: expected 'kl' or 'ce', got 'fkl'"),
    ((X, INDEX, V), {"reduction": "mean"}, ValueError, "reduction: expected 'batchmean', 'sum' or 'none', got 'mean'"),
    ((X, INDEX, V), {"backend": "cuda"}, NotImplementedError, "sparse_label_loss has no cuda kernel"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        sparse_label_loss(*args, **options)


RAW = (1.0, 0, 0.0, True, 1.0, True)
RAW_BAD = [
    ((X[0], INDEX, V, *RAW), r"logits: expected \[N, C\], got 1 dimensions"),
    ((X, INDEX.int(), V, *RAW), "indices: expected int64"),
    ((X, INDEX, V.double(), *RAW), "values: expected uint8 codes or float32"),
    ((X, INDEX, V[:, :1], *RAW), r"values: expected \[2, 2\]"),
    ((X[:, :1], INDEX, V, *RAW), "indices: expected 1 to 1 classes a row, got 2"),
    ((X, INDEX, V, 1.0, 3, *RAW[2:]), r"tail: expected 0 \(smooth\), 1 \(zeros\) or 2 \(renorm\), got 3"),
    ((X, INDEX, V, 0.0, *RAW[1:]), "T: expected a positive number, got 0"),
]


@pytest.mark.parametrize(("args", "message"), RAW_BAD)
def test_direct_calls_never_read_astray(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.sparse_label_loss(*args)


def test_rows_of_no_distribution_are_nan():
    """A class number out of range where it cannot be checked, and one given twice."""
    logits = torch.randn(4, 6, requires_grad=True)
    indices = torch.tensor([[0, 6], [1, 2], [-1, 3], [4, 4]])
    expected = torch.tensor([True, False, True, True])
    loss = OPS.sparse_label_loss(logits, indices, torch.full((4, 2), 0.25), *RAW)[0]
    assert torch.equal(loss.isnan(), expected)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(grad.isnan(), expected[:, None].expand(4, 6))


def test_meta_tensors_and_autocast():
    assert sparse_label_loss(X.to("meta"), INDEX.to("meta"), V.to("meta"), reduction="none").shape == (2,)
    with torch.autocast("cpu", torch.bfloat16):
        found = [sparse_label_loss(X.bfloat16(), INDEX, V, T=20.0, backend=each) for each in ("auto", "reference")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert found[0].dtype == torch.float32
    assert sparse_label_loss(X.bfloat16(), INDEX, V).dtype == torch.bfloat16
    assert sparse_label_loss(X[:0], INDEX[:0], V[:0]).isnan()
