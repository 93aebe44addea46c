"""The soft-label cross entropy against its definition: a table of cases under `check_op`, and the messages."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import reference, soft_cross_entropy
from pydistill.ops.soft_cross_entropy import KINDS
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill
KIND = {"hard": 0, "logits": 1, "probs": 2}


def ours(logits, *soft, kind, hard=None, reduction="mean"):
    """Hard labels come as an option: `check_op` differentiates in every tensor."""
    return soft_cross_entropy(logits, hard if kind == "hard" else soft[0], label_kind=kind, reduction=reduction)


def plain(logits, *soft, kind, hard=None, reduction="mean"):
    return reference.soft_cross_entropy(logits, hard if kind == "hard" else soft[0], kind, reduction)


def raw_calls(logits, *soft, kind, hard=None, reduction="mean"):
    """The four registered operators with the arguments of one case."""
    N = len(logits)
    labels = hard if kind == "hard" else soft[0]
    logits_t = torch.randn_like(logits, requires_grad=True)
    labels_t = logits.new_empty(N, 0) if kind == "hard" else torch.randn_like(labels, requires_grad=True)
    grad = torch.randn(N, dtype=logits.dtype)
    inputs, direction = (logits, labels), (logits_t, labels_t)
    still = [t.detach() for t in (*inputs, *direction)]  # the last operator has no derivative to ask for
    number = KIND[kind]
    return [
        (OPS.soft_cross_entropy.default, (*inputs, number)),
        (OPS.soft_cross_entropy_backward.default, (grad.clone().requires_grad_(), *inputs, number)),
        (OPS.soft_cross_entropy_jvp.default, (*inputs, *direction, number)),
        (OPS.soft_cross_entropy_backward_jvp.default, (grad, None, *still, number)),
        (OPS.soft_cross_entropy_backward_jvp.default, (grad, grad, *still, number)),
    ]


def rows(N, K, kind, layout="dense"):
    """Logits of several sizes of row, and soft labels; probabilities of which some rows do not sum to one."""

    def arranged(tensor):
        if layout == "slice":
            wide = tensor.new_zeros(2 * N, 3 * K + 1)
            wide[1::2, 1::3] = tensor
            return wide[1::2, 1::3]
        if layout == "transposed":
            return tensor.t().contiguous().t()
        return tensor[:1].expand(N, K) if layout == "expanded" else tensor

    def make(dtype):
        generator = torch.Generator().manual_seed(N * K)
        logits = torch.randn(N, K, generator=generator, dtype=torch.float64)
        logits = logits * torch.linspace(0.5, 3, N, dtype=torch.float64).view(-1, 1) + 5
        labels = torch.randn(N, K, generator=generator, dtype=torch.float64)
        if kind == "probs":
            labels = labels.softmax(1)
            labels[::2] = 1.5 * labels[::2] - 0.1
        tensors = (logits,) if kind == "hard" else (logits, labels)
        return tuple(arranged(t.to(dtype)) for t in tensors)

    options = {"kind": kind, "reduction": "none"}
    if kind == "hard":
        options["hard"] = torch.arange(N) * 7 % K
    return make, options


# sums run in sixteen parts, threads take 4096 // K rows at least
SIZES = [(5, 10), (3, 1), (1, 2), (2, 15), (3, 16), (2, 17), (4, 37), (2, 1009), (0, 10)]
CASES = [Case(f"{kind} {N}x{K}", *rows(N, K, kind)) for kind in KINDS for N, K in SIZES]
CASES += [
    Case(f"{kind} {layout}", *rows(3, 11, kind, layout))
    for kind in KINDS
    for layout in ("slice", "transposed", "expanded")
]
for reduction in ("sum", "mean"):
    for kind in KINDS:
        make, options = rows(6, 7, kind)
        CASES.append(Case(f"{kind} {reduction}", make, {**options, "reduction": reduction}))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_over_several_threads(kind):
    make, options = rows(3000, 13, kind)
    check_op(ours, plain, [Case(kind, make, options)], checks=["values", "repeats"])


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_logits(kind):
    """Sizes at which exp overflows, underflows and is subnormal, in output and gradient."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [100.0, 10.0, 0.0], [-300.0, -400.0, -388.0], [0.0, 95.0, 0.0]])
    labels = {"hard": torch.tensor([1, 2, 0, 1]), "logits": 50 * logits.flip(0), "probs": torch.rand(4, 3)}[kind]

    def values(f, logits, labels):
        leaves = [t.requires_grad_() for t in (logits.clone(), labels.clone()) if t.is_floating_point()]
        loss = f(leaves[0], leaves[-1] if len(leaves) == 2 else labels)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    doubles = [t.double() if t.is_floating_point() else t for t in (logits, labels)]
    truth = values(lambda a, b: reference.soft_cross_entropy(a, b, kind, "none"), *doubles)
    actual = values(lambda a, b: soft_cross_entropy(a, b, label_kind=kind, reduction="none"), logits, labels)
    for a, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=2e-6, atol=1e-37)


def test_masked_classes():
    """A logit of -inf takes a class out, unless it is the label."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], dtype=torch.float64).requires_grad_()
    for label in (0, 1):
        labels = torch.tensor([label])
        loss, truth = soft_cross_entropy(logits, labels), F.cross_entropy(logits, labels)
        assert torch.equal(loss, truth) or torch.allclose(loss, truth)
        actual, expected = (torch.autograd.grad(x, logits)[0] for x in (loss, truth))
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_labels_of_half_precision_logits(kind):
    logits, labels = torch.randn(4, 6).bfloat16().requires_grad_(), torch.rand(4, 6).requires_grad_()
    if kind == "hard":
        loss = soft_cross_entropy(logits, torch.arange(4))
        assert loss.dtype == torch.bfloat16
        return
    loss = soft_cross_entropy(logits, labels, label_kind=kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference.soft_cross_entropy(logits.float(), labels, kind))
    grads = torch.autograd.grad(loss, (logits, labels))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


def test_autocast_gives_float32_as_in_torch():
    logits, soft = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).softmax(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, truth = soft_cross_entropy(logits, torch.arange(4)), F.cross_entropy(logits, torch.arange(4))
        given = {"label_kind": "probs"}
        found = [soft_cross_entropy(logits, soft, **given, backend=backend) for backend in ("auto", "reference")]
    assert actual.dtype == truth.dtype == found[0].dtype == torch.float32
    torch.testing.assert_close(actual, truth)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_vmap_over_hard_labels():
    logits, labels = torch.randn(3, 4, 5, dtype=torch.float64), torch.arange(12).view(3, 4) % 5
    truth = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.func.vmap(soft_cross_entropy)(logits, labels), truth)
    of = torch.func.vmap(torch.func.grad(soft_cross_entropy), (None, 0))(logits[0], labels)
    truth = torch.stack([torch.func.grad(F.cross_entropy)(logits[0], y) for y in labels])
    torch.testing.assert_close(of, truth)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(soft_cross_entropy)))(logits, labels)
    truth = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(F.cross_entropy)))(logits, labels)
    torch.testing.assert_close(hessian, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor(kind):
    logits = torch.randn(6, 10, requires_grad=True)
    labels = torch.arange(6) if kind == "hard" else torch.rand(6, 10)
    compiled = torch.compile(lambda a, b: soft_cross_entropy(2 * a, b, label_kind=kind).square(), fullgraph=True)
    truth = reference.soft_cross_entropy(2 * logits, labels, kind).square()
    loss = compiled(logits, labels)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, truth)))


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivative_is_refused(kind):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(3) if kind == "hard" else torch.rand(3, 4, dtype=torch.float64)
    (first,) = torch.autograd.grad(soft_cross_entropy(logits, labels, label_kind=kind), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        torch.autograd.grad(second.square().sum(), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_beside_other_terms(kind):
    """An opaque backward would drop terms here, without an error."""
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(3) if kind == "hard" else torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    leaves = (logits,) if kind == "hard" else (logits, labels)

    def second(f):
        loss = f(logits, labels, label_kind=kind).square() + sum((x**3).sum() for x in leaves)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(second(soft_cross_entropy), second(reference.soft_cross_entropy), rtol=1e-10, atol=1e-10)


def test_direct_calls_have_gradients():
    """An operator of C++ without an autograd formula gives None, with no more than a warning."""
    leaves = [torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for number, kind in enumerate(KINDS[1:], 1):
        grads = torch.autograd.grad(OPS.soft_cross_entropy(*leaves, number).mean(), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(reference.soft_cross_entropy(*leaves, kind), leaves))
    (grad,) = torch.autograd.grad(OPS.soft_cross_entropy(leaves[0], torch.arange(3), 0).mean(), leaves[0])
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(leaves[0], torch.arange(3)), leaves[0])[0])


ISA_SCRIPT = """
import torch, pydistill, hashlib
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for K in (1, 10, 16, 203):
        for kind in ("hard", "logits", "probs"):
            leaves = [(5 * torch.randn(7, K, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]
            labels = leaves[1] if kind != "hard" else torch.arange(7) % K
            with torch.no_grad():  # classes that take no part
                leaves[0][6, K // 2 + 1 :] = -torch.inf
                leaves[1][6, K // 2 + 1 :] = 0 if kind == "probs" else -torch.inf
                if kind == "hard":
                    labels[6] = 0
            leaves = leaves if kind != "hard" else leaves[:1]
            loss = pydistill.soft_cross_entropy(leaves[0], labels, label_kind=kind, reduction="none")
            first = torch.autograd.grad(loss.square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            for t in (loss, *first, *second):
                digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


X, Y, T = torch.randn(2, 3), torch.tensor([0, 2]), torch.rand(2, 3)
SOFT = {"label_kind": "probs"}
BAD = [
    (("x", Y), {}, TypeError, "logits: expected a tensor, got str"),
    ((X, [0, 2]), {}, TypeError, "labels: expected a tensor, got list"),
    ((X.int(), Y), {}, TypeError, "logits: expected float32, float64, bfloat16 or float16, got torch.int32"),
    ((X, Y.int()), {}, TypeError, "labels: expected int64 class numbers for label_kind='hard', got torch.int32"),
    ((X, T), {}, TypeError, "labels: expected int64 class numbers for label_kind='hard', got torch.float32"),
    ((X, Y), SOFT, TypeError, "labels: expected float32, float64, bfloat16 or float16, got torch.int64"),
    ((X[0], Y), {}, ValueError, r"logits: expected \[N, K\] with at least one class, got shape \[3\]"),
    ((X[:, :0], Y), {}, ValueError, r"logits: expected \[N, K\] with at least one class, got shape \[2, 0\]"),
    ((X, Y[:1]), {}, ValueError, r"labels: expected shape \[2\] for label_kind='hard' and logits \[2, 3\], got \[1\]"),
    ((X, T[:, :2]), SOFT, ValueError, r"labels: expected shape \[2, 3\] for label_kind='probs' .*, got \[2, 2\]"),
    ((X, Y.to("meta")), {}, ValueError, "labels: expected device cpu as logits, got meta"),
    ((X, Y + 1), {}, ValueError, r"labels: expected class numbers in 0\.\.2 for 3 classes, got 3"),
    ((X, Y - 100), {}, ValueError, "labels: .* got -100; ignore_index is not supported"),
    ((X, Y), {"label_kind": "soft"}, ValueError, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
    ((X, Y), {"reduction": "max"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
    ((X, Y), {"backend": "numpy"}, ValueError, "backend: expected one of auto, reference, cpu, cuda, triton"),
    ((X, Y), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run on cpu tensors"),
    ((X, Y), {"backend": "triton"}, NotImplementedError, "backend='triton' cannot run on cpu tensors"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        soft_cross_entropy(*args, **options)


def test_class_numbers_out_of_range_are_nan_where_they_cannot_be_looked_at():
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([-1, 2, 4])
    expected = torch.tensor([True, False, True])
    loss = OPS.soft_cross_entropy(logits, labels, 0)
    assert torch.equal(loss.isnan(), expected)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(grad.isnan(), expected[:, None].expand(3, 4))
    compiled = torch.compile(lambda a, b: soft_cross_entropy(a, b, reduction="none"), backend="eager")
    assert torch.equal(compiled(logits, labels).isnan(), expected)
    rows = torch.func.vmap(soft_cross_entropy)(logits[:, None], labels[:, None])
    assert torch.equal(rows.isnan(), expected)


RAW_BAD = [
    ((X[0], Y, 0), r"logits: expected \[N, K\], got 1 dimensions"),
    ((X, Y, 3), r"kind: expected 0 \(hard\), 1 \(logits\) or 2 \(probs\), got 3"),
    ((X[:, :0], Y, 0), "logits: expected at least one class"),
    ((X, Y[:1], 0), r"labels: expected \[2\]"),
    ((X, Y.int(), 0), "labels: expected int64"),
    ((X, T[:, :2], 2), r"labels: expected \[2, 3\]"),
    ((X, T.double(), 1), "labels: expected the dtype of logits"),
]


@pytest.mark.parametrize(("args", "message"), RAW_BAD)
def test_direct_calls_never_read_astray(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.soft_cross_entropy(*args)
    with pytest.raises(RuntimeError, match="grad: expected float32"):
        OPS.soft_cross_entropy_backward(torch.ones(2, dtype=torch.float64), X, Y, 0)
    with pytest.raises(RuntimeError, match=r"logits_t: expected \[2, 3\]"):
        OPS.soft_cross_entropy_jvp(X, Y, X[:1], X, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_backend_is_the_reference(kind, reduction):
    labels = Y if kind == "hard" else T
    out = soft_cross_entropy(X, labels, label_kind=kind, reduction=reduction, backend="reference")
    truth = F.cross_entropy(X, T.softmax(1) if kind == "logits" else labels, reduction=reduction)
    assert torch.equal(out, reference.soft_cross_entropy(X, labels, kind, reduction))
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(soft_cross_entropy(X, labels, label_kind=kind, reduction=reduction), truth)


def test_the_mean_of_no_rows_is_nan_as_in_torch():
    assert soft_cross_entropy(X[:0], Y[:0]).isnan()
    assert F.cross_entropy(X[:0], Y[:0]).isnan()


def test_meta_tensors_get_shapes():
    assert soft_cross_entropy(X.to("meta"), Y.to("meta")).shape == ()
    out = soft_cross_entropy(X.to("meta"), T.to("meta"), label_kind="logits", reduction="none")
    assert out.shape == (2,)
    assert out.device.type == "meta"
