"""The divergence between student and teacher against its definition and torch's, under `check_op`; and the messages."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import kd_divergence, reference
from pydistill.ops.kd_divergence import KINDS
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill


def arguments(student, options):
    """The target comes as an option, as it has no derivative: in the student's dtype, with numbers exact in all."""
    options = dict(options)
    target = options.pop("target")
    return (student, target.to(student.dtype) if target.is_floating_point() else target), options


def ours(student, **options):
    args, options = arguments(student, options)
    return kd_divergence(*args, **options)


def plain(student, **options):
    args, options = arguments(student, options)
    return reference.kd_divergence(*args, **options)


def raw_calls(student, *, target, labels=None, kind="fkl", target_is="logits", T=1.0, ce_weight=0.0, **_):
    """The four registered operators with the arguments of one case."""
    N = len(student)
    tensors = (None, target) if kind == "ce" else (target.to(student.dtype), labels)
    options = (KINDS.index(kind), target_is == "probs", T, 2.0, ce_weight, 0.3, 1.5)
    grad = torch.randn(N, dtype=student.dtype)
    student_t = torch.randn_like(student, requires_grad=True)
    still = (student.detach(), *tensors, student_t.detach(), *options)
    return [
        (OPS.kd_divergence.default, (student, *tensors, *options, True)),
        (OPS.kd_divergence.default, (student, *tensors, *options, False)),
        (OPS.kd_divergence_backward.default, (grad.clone().requires_grad_(), student, *tensors, *options)),
        (OPS.kd_divergence_jvp.default, (student, *tensors, student_t, *options)),
        (OPS.kd_divergence_backward_jvp.default, (grad, None, *still)),
        (OPS.kd_divergence_backward_jvp.default, (grad, grad, *still)),
    ]


def rows(N, C, kind="fkl", target_is="logits", layout="dense", **options):
    def make(dtype):
        student = torch.randn(N, C, generator=torch.Generator().manual_seed(N * C), dtype=torch.float64)
        student = (student * torch.linspace(0.5, 3, N, dtype=torch.float64).view(-1, 1) + 5).to(dtype)
        if layout == "slice":
            wide = student.new_zeros(2 * N, 3 * C + 1)
            wide[1::2, 1::3] = student
            return (wide[1::2, 1::3],)
        if layout == "transposed":
            return (student.t().contiguous().t(),)
        return (student[:1].expand(N, C) if layout == "expanded" else student,)

    generator = torch.Generator().manual_seed(C)
    labels = torch.randint(C, (N,), generator=generator)
    # sixteenths and 128ths: exact in bfloat16
    target = torch.randint(-64, 64, (N, C), generator=generator) / 16
    if target_is == "probs":
        target = torch.randint(1, 64, (N, C), generator=generator) / 128
    options = {"kind": kind, "target_is": target_is, "reduction": "none", "beta": 0.3, "gamma": 1.5, **options}
    options["target"] = labels if kind == "ce" else target
    if kind == "ofa" or "ce_weight" in options:
        options["labels"] = labels
    return make, options


# sums run in sixteen parts, threads take 4096 // C rows at least
SIZES = [(3, 1), (2, 15), (3, 16), (2, 17), (2, 1009), (0, 10)]
CASES = [Case(f"{kind} 3x7", *rows(3, 7, kind, T=2.0)) for kind in KINDS]
CASES += [Case(f"{kind} probs 3x7", *rows(3, 7, kind, "probs")) for kind in KINDS if kind not in ("ce", "mse")]
CASES += [Case(f"fkl {N}x{C}", *rows(N, C, T=4.0)) for N, C in SIZES]
CASES += [Case(f"jsd {layout}", *rows(3, 11, "jsd", layout=layout)) for layout in ("slice", "transposed", "expanded")]
CASES += [Case(f"{kind} and labels", *rows(4, 9, kind, T=3.0, ce_weight=0.7)) for kind in ("fkl", "rkl", "mse", "ofa")]
CASES += [
    Case("labels, T 1, batchmean", *rows(4, 9, ce_weight=0.7, reduction="batchmean")),
    Case("mse, mean", *rows(4, 9, "mse", ce_weight=0.7, reduction="mean")),
    Case("soft_ce, sum, no T^2", *rows(4, 9, "soft_ce", T=20.0, scale_T2=False, reduction="sum")),
]
QUICK = [case for case in CASES if case.name in ("fkl 2x17", "jsd 3x7", "mse, mean", "rkl and labels", "fkl 0x10")]


@pytest.mark.parametrize("check", ["values", "gradcheck", "nan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case, check):
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("values", "gradcheck", "nan")])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_rest_of_the_matrix(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def test_rows_over_several_threads():
    make, options = rows(3000, 13, "rkl", ce_weight=0.5)
    check_op(ours, plain, [Case("threads", make, options)], checks=["values", "repeats"])


STUDENT, TEACHER = 3 * torch.randn(2, 5, 9, dtype=torch.float64), 3 * torch.randn(2, 5, 9, dtype=torch.float64)
Y = torch.arange(10).view(2, 5) % 9
LOG_Q, P = (STUDENT / 4).log_softmax(-1).flatten(0, 1), (TEACHER / 4).softmax(-1).flatten(0, 1)
CE = F.cross_entropy(STUDENT.flatten(0, 1), Y.flatten())
TORCH = {
    "fkl": 16 * F.kl_div(LOG_Q, P, reduction="batchmean"),
    "rkl": 16 * F.kl_div(P.log(), LOG_Q.exp(), reduction="batchmean"),
    "soft_ce": 16 * F.cross_entropy(STUDENT.flatten(0, 1) / 4, P),
    "mse": (STUDENT - TEACHER).square().sum() / 10,
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", TORCH)
def test_torch_says_the_same(kind, backend):
    """Over all leading dimensions, and with the terms besides the divergence."""
    options = {"kind": kind, "T": 4, "backend": backend}
    torch.testing.assert_close(kd_divergence(STUDENT, TEACHER, **options), TORCH[kind])
    both = kd_divergence(STUDENT, TEACHER, labels=Y, ce_weight=0.5, **options)
    torch.testing.assert_close(both, TORCH[kind] + 0.5 * CE)
    unscaled = kd_divergence(STUDENT, TEACHER, scale_T2=False, **options)
    torch.testing.assert_close(unscaled, TORCH[kind] / 16)
    weight = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    each = kd_divergence(STUDENT, TEACHER, reduction="none", **options)
    weighed = kd_divergence(STUDENT, TEACHER, weight=weight, reduction="sum", **options)
    torch.testing.assert_close(weighed, (each * weight).sum())
    torch.testing.assert_close(torch.autograd.grad(weighed, weight)[0], each)


def test_mean_is_torchs_and_leaves_the_cross_entropy():
    """HeLlO's projector loss."""
    loss = kd_divergence(STUDENT, TEACHER, kind="mse", labels=Y, ce_weight=0.1, reduction="mean")
    torch.testing.assert_close(loss, F.mse_loss(STUDENT, TEACHER) + 0.1 * CE)
    loss = kd_divergence(STUDENT, TEACHER, T=4, reduction="mean")
    torch.testing.assert_close(loss, TORCH["fkl"] / STUDENT.shape[-1])  # F.kl_div says so, with a warning


def test_jensen_shannon_is_symmetric_and_one_for_all_is_soft_at_gamma_one():
    there, back = (kd_divergence(a, b, kind="jsd") for a, b in ((STUDENT, TEACHER), (TEACHER, STUDENT)))
    torch.testing.assert_close(there, back)
    assert 0 < there < torch.tensor(2.0).log()
    ofa = kd_divergence(STUDENT, TEACHER, kind="ofa", labels=Y)
    torch.testing.assert_close(ofa, kd_divergence(STUDENT, TEACHER, kind="soft_ce"))


@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd", "soft_ce"])
def test_masked_classes_take_no_part(kind):
    """-inf on both sides, in value, gradient and second derivative."""

    def values(student, target):
        x = student.clone().requires_grad_()
        loss = kd_divergence(x, target, kind=kind, T=2.0, reduction="sum")
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss, first, *torch.autograd.grad(first.square().sum(), x)

    student, target = STUDENT[0], TEACHER[0]
    padding = torch.full((5, 2), -torch.inf, dtype=torch.float64)
    truth, actual = values(student, target), values(*(torch.cat([x, padding], 1) for x in (student, target)))
    torch.testing.assert_close(actual[0], truth[0])
    for a, t in zip(actual[1:], truth[1:], strict=True):
        torch.testing.assert_close(a, F.pad(t, (0, 2)))


def test_far_apart_logits():
    """Sizes at which exp underflows to subnormal numbers and zero, in float32."""
    student = torch.tensor([[1e4, 0.0, -1e4], [100.0, 10.0, 0.0], [-300.0, -400.0, -388.0], [0.0, 95.0, 0.0]])
    target = student.flip(0) / 100
    for kind in ("fkl", "jsd", "soft_ce"):

        def values(f, dtype, kind=kind):
            x = student.to(dtype).requires_grad_()
            loss = f(x, target.to(dtype), kind=kind, reduction="none")
            return loss, *torch.autograd.grad(loss.sum(), x)

        pairs = zip(values(kd_divergence, torch.float32), values(reference.kd_divergence, torch.float64), strict=True)
        for actual, truth in pairs:
            torch.testing.assert_close(actual.double(), truth, rtol=3e-6, atol=1e-6)


def test_logarithms_of_probabilities():
    """Over all sizes that float32 has: a target of which only the entropy is examined."""
    p = torch.logspace(-44, 0, 4001, dtype=torch.float64).float()[:, None]
    found = kd_divergence(torch.zeros_like(p), p, target_is="probs", reduction="none")
    torch.testing.assert_close(found.double(), (p.double() * p.double().log())[:, 0], rtol=3e-7, atol=1e-44)
    p = torch.tensor([[0.0], [-1.0], [torch.inf], [torch.nan]])
    found = kd_divergence(torch.zeros_like(p), p, target_is="probs", reduction="none")
    assert found[0] == 0
    assert found[1].isnan()
    assert found[2] == torch.inf
    assert found[3].isnan()


def test_half_precision_targets_beside_float32():
    """The labels of a store: read as they are."""
    student, target = STUDENT.float(), TEACHER.half()
    expected = kd_divergence(student, target.float(), T=20, scale_T2=False)
    actual = kd_divergence(student, target, T=20, scale_T2=False)
    assert torch.equal(actual, expected)
    assert actual.dtype == torch.float32
    assert kd_divergence(student, TEACHER).dtype == torch.float32
    torch.testing.assert_close(kd_divergence(student, TEACHER), kd_divergence(STUDENT, TEACHER).float())


def test_a_graph_can_be_gone_through_again():
    """The first pass overwrites what was kept; others must not see that."""
    x = STUDENT.clone().requires_grad_()
    weight = torch.rand(2, 5, dtype=torch.float64)
    loss = kd_divergence(x, TEACHER, weight=weight, reduction="sum")
    first = [torch.autograd.grad(loss, x, 3 * torch.ones_like(loss), retain_graph=True)[0].clone() for _ in range(3)]
    for other in first[1:]:
        torch.testing.assert_close(other, first[0])
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(again * 3, first[0])
    truth = reference.kd_divergence(x, TEACHER, weight=weight, reduction="sum")
    torch.testing.assert_close(again, torch.autograd.grad(truth, x)[0])


def test_second_derivative_beside_other_terms():
    """An opaque backward would drop terms here, without an error."""
    x = STUDENT.clone().requires_grad_()

    def second(f):
        loss = f(x, TEACHER, kind="jsd", T=2.0).square() + (x**3).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    torch.testing.assert_close(second(kd_divergence), second(reference.kd_divergence), rtol=1e-10, atol=1e-10)


def test_third_derivative_is_refused():
    x = STUDENT.clone().requires_grad_()
    (first,) = torch.autograd.grad(kd_divergence(x, TEACHER), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice, not more"):
        torch.autograd.grad(second.square().sum(), x)


ISA_SCRIPT = """
import torch, pydistill, hashlib
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for C in (1, 10, 203):
        for kind in ("fkl", "rkl", "jsd", "ce", "mse", "ofa"):
            for probs in ("logits", "probs"):
                if kind == "mse" and probs == "probs":
                    continue
                x = (5 * torch.randn(7, C, generator=generator)).to(dtype).requires_grad_()
                labels = torch.arange(7) % C
                target = (torch.randint(1, 9, (7, C), generator=generator) / 8).to(dtype)
                with torch.no_grad():  # rows that underflow, and classes that take no part
                    x[5] *= 30
                    if kind != "mse":
                        x[6, C // 2 + 1 :] = -torch.inf
                        target[6, C // 2 + 1 :] = 0 if probs == "probs" else -torch.inf
                labels[6] = 0
                options = {"kind": kind, "T": 3.0, "target_is": probs, "gamma": 1.5, "reduction": "none"}
                if kind != "ce":
                    options |= {"labels": labels, "ce_weight": 0.5}
                loss = pydistill.kd_divergence(x, labels if kind == "ce" else target, **options)
                (first,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
                (second,) = torch.autograd.grad(first.square().sum(), x)
                for t in (loss, first, second):
                    digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bitwise(same_in_every_isa):
    same_in_every_isa(ISA_SCRIPT)


X, Z, L = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 2])
BAD = [
    (("x", Z), {}, TypeError, "student_logits: expected a tensor, got str"),
    ((X, [0, 2]), {}, TypeError, "target: expected a tensor, got list"),
    ((X.int(), Z), {}, TypeError, "student_logits: expected float32, .* got torch.int32"),
    ((X, L), {}, TypeError, "target: expected float32, .* got torch.int64"),
    ((X[:, :0], Z), {}, ValueError, r"student_logits: expected \[\.\.\., C\] with at least one class, .* \[2, 0\]"),
    ((X, Z[:, :2]), {}, ValueError, "target: expected 3 classes as student_logits, got 2"),
    ((X, Z[:1]), {}, ValueError, r"target: expected shape \[2, 3\] as student_logits, got \[1, 3\]"),
    ((X, Z.clone().requires_grad_()), {}, ValueError, r"target: expected a teacher without gradient"),
    ((X, Z.to("meta")), {}, ValueError, "target: expected device cpu as student_logits, got meta"),
    ((X, Z), {"kind": "kl"}, ValueError, "kind: expected one of fkl, .*, got 'kl'"),
    ((X, Z), {"T": 0}, ValueError, "T: expected a positive number, got 0"),
    ((X, Z), {"T": -1.0}, ValueError, "T: expected a positive number, got -1.0"),
    ((X, Z), {"gamma": float("nan")}, ValueError, "gamma: expected a positive number, got nan"),
    ((X, Z), {"beta": 1.0}, ValueError, "beta: expected a number between 0 and 1, got 1.0"),
    ((X, Z), {"target_is": "log"}, ValueError, "target_is: expected 'logits' or 'probs', got 'log'"),
    ((X, Z), {"kind": "mse", "target_is": "probs"}, ValueError, "target_is: expected 'logits' for kind='mse'"),
    ((X, Z), {"reduction": "max"}, ValueError, "reduction: expected 'batchmean', .*, got 'max'"),
    ((X, Z), {"ce_weight": 1.0}, ValueError, "labels: expected class numbers for a ce_weight, got None"),
    ((X, Z), {"ce_weight": "1"}, ValueError, "ce_weight: expected a number, got '1'"),
    ((X, Z), {"kind": "ofa"}, ValueError, "labels: expected class numbers for ofa, got None"),
    ((X, Z), {"labels": L.int()}, TypeError, "labels: expected int64 class numbers, got torch.int32"),
    ((X, Z), {"labels": L[:1]}, ValueError, r"labels: expected a class number for each row, shape \[2\], got \[1\]"),
    ((X, Z), {"labels": L + 1}, ValueError, r"labels: expected class numbers in 0\.\.2 for 3 classes, got 3"),
    ((X, L), {"kind": "ce", "labels": L}, ValueError, "labels: expected None for kind='ce'"),
    ((X, Z), {"kind": "ce"}, TypeError, "target: expected int64 class numbers, got torch.float32"),
    ((X, L - 1), {"kind": "ce"}, ValueError, r"target: expected class numbers in 0\.\.2 for 3 classes, got -1"),
    ((X, Z), {"weight": torch.ones(3)}, ValueError, r"weight: expected a weight for each row, shape \[2\], got \[3\]"),
    ((X, Z), {"weight": L}, TypeError, "weight: expected float32, .* got torch.int64"),
    ((X, Z), {"backend": "cuda"}, NotImplementedError, "kd_divergence has no cuda kernel"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        kd_divergence(*args, **options)


RAW = (0, False, 1.0, 1.0, 0.0, 0.5, 1.0)
RAW_BAD = [
    ((X[0], Z, None, *RAW, True), r"student: expected \[N, C\], got 1 dimensions"),
    ((X, Z[:, :2], None, *RAW, True), r"target: expected \[2, 3\]"),
    ((X, Z.double(), None, *RAW, True), "target: expected float64 where student is, and only there"),
    ((X, None, None, *RAW, True), "target: expected none for ce, and one for every other kind"),
    ((X, Z, L.int(), *RAW, True), "labels: expected int64"),
    ((X, Z, None, *RAW[:4], 1.0, *RAW[5:], True), "labels: expected class numbers for ce, ofa and a ce_weight"),
    ((X, Z, None, 7, *RAW[1:], True), "kind: expected 0..6, got 7"),
    ((X, Z, None, *RAW[:2], 0.0, *RAW[3:], True), "T: expected a positive number, got 0"),
]


@pytest.mark.parametrize(("args", "message"), RAW_BAD)
def test_direct_calls_never_read_astray(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.kd_divergence(*args)


def test_class_numbers_out_of_range_are_nan_where_they_cannot_be_looked_at():
    x, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([-1, 2, 4])
    expected = torch.tensor([True, False, True])
    for kind, target, weight in ((4, None, 0.0), (6, torch.randn(3, 4), 0.0), (0, torch.randn(3, 4), 1.0)):
        loss = OPS.kd_divergence(x, target, labels, kind, False, 2.0, 1.0, weight, 0.5, 1.0, True)[0]
        assert torch.equal(loss.isnan(), expected)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(grad.isnan(), expected[:, None].expand(3, 4))


def test_meta_tensors_and_autocast():
    assert kd_divergence(X.to("meta"), Z.to("meta")).shape == ()
    assert kd_divergence(X.to("meta"), Z.to("meta"), reduction="none").shape == (2,)
    x, z = X.bfloat16(), Z.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for kind in ("fkl", "jsd", "mse"):
            found = [kd_divergence(x, z, kind=kind, T=20.0, backend=backend) for backend in ("auto", "reference")]
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
            assert found[0].dtype == torch.float32
    assert kd_divergence(X.bfloat16(), Z.bfloat16()).dtype == torch.bfloat16
    assert kd_divergence(X[:0], Z[:0]).isnan()
