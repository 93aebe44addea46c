"""The divergence between two attention maps against its definition: cases under `check_op`, and the messages."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from pydistill import reference
from pydistill.ops import _operator, attention_map_divergence
from pydistill.testing import CHECKS, Case, check_op

OPS = torch.ops.pydistill
KINDS = ("fkl", "rkl", "jsd", "ce")


def ours(q_s, k_s, *, teacher, **options):
    """The teacher comes as an option: `check_op` differentiates in every tensor."""
    return attention_map_divergence(q_s, k_s, *(x.to(q_s.dtype) for x in teacher), **options)


def plain(q_s, k_s, *, teacher, **options):
    return reference.attention_map_divergence(q_s, k_s, *(x.to(q_s.dtype) for x in teacher), **options)


def raw_calls(q_s, k_s, *, teacher, kind="fkl", mask=None, **options):
    """The registered operators, over four-dimensional heads, with and without gradients; permuted and empty too."""

    def heads(x):
        return x.reshape(1, 1, *x.shape[-2:]) if x.dim() == 2 else x.reshape(1, *x.shape[-3:])

    if q_s.dim() > 3:
        q_s, k_s, *teacher = (x[0] if x.dim() > 3 else x for x in (q_s, k_s, *teacher))
    if k_s.dim() < q_s.dim():
        return []
    tensors = [heads(x) for x in (q_s, k_s, *teacher)]
    tail = (0.3, 0.4, KINDS.index(kind), 0.5)
    grad = torch.randn(tensors[0].shape[:3], dtype=q_s.dtype)
    still = [x.detach() for x in tensors]
    swapped = [x.detach().mT.contiguous().mT for x in tensors]
    empty = [x.detach()[:, :, :0] if i % 2 == 0 else x.detach() for i, x in enumerate(tensors)]
    calls = [
        (OPS.attention_map_divergence.default, (*tensors, None, *tail, True, True, True)),
        (OPS.attention_map_divergence.default, (*tensors, None, *tail, False, False, False)),
        (OPS.attention_map_divergence_scale.default, (grad.sum(), still[0], still[1], *still[:2])),
    ]
    for given in (still, swapped, empty):
        here = grad if given is not empty else grad[:, :, :0]
        calls.append((OPS.attention_map_divergence.default, (*given, None, *tail, True, True, False)))
        calls.append((OPS.attention_map_divergence_backward.default, (here, *given, None, *tail, True, True)))
    return calls


def case(name, lead, N, M, d_s, d_t, *, keys="own", layout="dense", scale=1.0, mask=None, dtypes=None, **options):
    """Queries and keys of several sizes of score; ``keys``: "own", "shared", or "student" (shared there alone)."""
    generator = torch.Generator().manual_seed(N * M + d_s)

    def draw(*shape):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    key_lead = {"s": lead if keys == "own" else (), "t": lead if keys in ("own", "student") else ()}
    q_s, k_s = draw(*lead, N, d_s), draw(*key_lead["s"], M, d_s)
    teacher = (draw(*lead, N, d_t), draw(*key_lead["t"], M, d_t))
    masks = {
        None: lambda: None,
        "keys": lambda: (torch.arange(M) % 3 != 1).expand(*(1 for _ in lead), 1, M),
        "vector": lambda: torch.arange(M) % 3 != 1,
        "causal": lambda: torch.ones(N, M, dtype=torch.bool).tril(),
        "heads": lambda: torch.rand(*lead, N, M, generator=generator) < 0.6,
        "samples": lambda: torch.rand(lead[0], *(1 for _ in lead[1:]), 1, M, generator=generator) < 0.6,
    }
    mask = masks[mask]()
    if mask is not None and mask.dim() > 2:
        mask[..., 0] = True

    def arranged(x):
        if layout == "qkv":  # the layout of a transformer's projection: [B, N, 3, H, d]
            wide = x.new_zeros(x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3])
            wide[:, :, 1] = x.transpose(1, 2)
            return wide[:, :, 1].transpose(1, 2)
        if layout == "slice":
            wide = x.new_zeros(*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1])
            wide[..., 1::2, 1::3] = x
            return wide[..., 1::2, 1::3]
        return x

    def make(dtype):
        return tuple(arranged(x.to(dtype)) for x in (q_s, k_s))

    extra = {} if dtypes is None else {"dtypes": dtypes}
    return Case(name, make, {"teacher": teacher, "mask": mask, **options}, order=1, **extra)


CASES = [
    *(case(f"{kind} {red}", (2, 3), 7, 11, 5, 9, kind=kind, reduction=red)
      for kind in KINDS for red in ("batchmean", "none")),
    *(case(f"{kind} own temperatures", (4,), 13, 17, 8, 3, kind=kind, T_s=0.7, T_t=1.3, reduction="sum")
      for kind in KINDS),
    case("jsd beta", (2,), 9, 10, 6, 6, kind="jsd", beta=0.1),
    case("one query, one key", (1,), 1, 1, 1, 1, kind="ce"),
    case("no leading dimension", (), 6, 5, 16, 4),
    case("three leading dimensions", (2, 1, 3), 5, 6, 4, 4, reduction="none"),
    case("blocks of rows and vectors of keys, partly filled", (1, 2), 53, 47, 17, 33),
    case("whole tiles", (1, 2), 48, 32, 16, 16),
    case("in chunks", (2,), 300, 20, 9, 7),
    case("in chunks, rkl", (1,), 131, 64, 9, 7, kind="rkl", reduction="none"),
    case("as a projection leaves it", (2, 3), 10, 12, 8, 8, layout="qkv"),
    case("slices", (2, 3), 10, 12, 8, 8, layout="slice", reduction="none"),
    case("shared keys", (2, 3), 5, 30, 8, 6, keys="shared", kind="ce"),
    case("shared keys, masked", (4,), 5, 30, 8, 6, keys="shared", mask="vector", reduction="none"),
    case("shared keys, each head its mask", (4,), 5, 30, 8, 6, keys="shared", mask="heads"),
    case("the student's keys shared", (2, 3), 5, 10, 8, 6, keys="student"),
    *(case(f"mask of {mask}, {kind}", (2, 3), 9, 9, 5, 4, mask=mask, kind=kind)
      for kind in KINDS for mask in ("keys", "causal", "heads", "samples")),
    case("mask of three leading dimensions", (2, 2, 3), 4, 7, 5, 4, mask="samples", reduction="none"),
    case("empty", (0, 3), 4, 5, 6, 6, reduction="none"),
    case("no queries", (2,), 0, 5, 6, 6, reduction="sum"),
    # e^-87 and less is treated as zero
    *(case(f"sharp maps, {kind}", (2,), 12, 40, 16, 16, scale=4.0, kind=kind, dtypes=(torch.float32,))
      for kind in KINDS),
]  # fmt: skip


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("func", "compile", "opcheck")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_definition(case, check):
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("check", ["func", "compile", "opcheck"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("fkl mean", "fkl none", "jsd none", "shared keys", "in chunks")],
    ids=lambda case: case.name,
)  # fmt: skip
def test_with_the_framework(case, check):
    check_op(ours, plain, [case], raw_calls=raw_calls, checks=[check])


def test_equal_to_the_line_in_the_docstring():
    q_s, k_s, q_t, k_t = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(4))
    student, teacher = (q @ k.mT / 2 for q, k in ((q_s, k_s), (q_t, k_t)))
    rows = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(attention_map_divergence(q_s, k_s, q_t, k_t), rows.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_map_from_itself(kind):
    q, k = torch.randn(2, 30, 8), torch.randn(2, 40, 8)
    q.requires_grad_()
    loss = attention_map_divergence(q, k, q.detach(), k, kind=kind, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), q)
    entropy = torch.distributions.Categorical(logits=q.detach() @ k.mT / math.sqrt(8)).entropy()
    torch.testing.assert_close(loss.detach(), entropy if kind == "ce" else torch.zeros(2, 30), atol=2e-6, rtol=1e-6)
    assert grad.abs().max() < 1e-5


def test_gradients_come_only_where_they_are_asked_for(monkeypatch):
    q_s, k_s, q_t, k_t = (torch.randn(2, 5, 4) for _ in range(4))
    asked = []
    module = importlib.import_module("pydistill.ops.attention_map_divergence")
    run = module._native.forward.raw
    monkeypatch.setattr(module._native.forward, "raw", lambda *args: asked.append(args[-3:]) or run(*args))
    attention_map_divergence(q_s, k_s, q_t, k_t)
    attention_map_divergence(q_s.requires_grad_(), k_s, q_t, k_t).backward()
    with torch.no_grad():
        attention_map_divergence(q_s, k_s, q_t, k_t)
    attention_map_divergence(q_s, k_s.requires_grad_(), q_t, k_t, reduction="none").sum().backward()
    assert asked == [(True, False, False), (True, True, False), (True, False, False), (False, False, False)]
    assert k_s.grad.shape == k_s.shape


def test_rows_weighted_alike_have_the_gradient_of_the_sum():
    q, k, q_t, k_t = (torch.randn(3, 70, 8, dtype=torch.float64) for _ in range(4))
    leaves = q.requires_grad_(), k.requires_grad_()
    for kind in KINDS:
        one = torch.autograd.grad(attention_map_divergence(*leaves, q_t, k_t, kind=kind, reduction="sum"), leaves)
        rows = attention_map_divergence(*leaves, q_t, k_t, kind=kind, reduction="none")
        for a, b in zip(one, torch.autograd.grad(rows.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_graph_can_be_gone_through_again():
    """The first pass uses what was kept for it; later ones recompute, and no returned result changes."""
    leaves = [torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    q_t, k_t = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    truth = torch.autograd.grad(reference.attention_map_divergence(*leaves, q_t, k_t), leaves)
    loss = attention_map_divergence(*leaves, q_t, k_t)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for factor in (2, 0):
        for found, right in zip(torch.autograd.grad(factor * loss, leaves, retain_graph=True), truth, strict=True):
            torch.testing.assert_close(found, factor * right)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[1], retain_graph=True)[0], truth[1])
    for found, right in zip(first, truth, strict=True):
        torch.testing.assert_close(found, 3 * right)
    loss = attention_map_divergence(*leaves, q_t, k_t)
    many = torch.autograd.grad(loss, leaves, torch.tensor([1.0, 2.0], dtype=torch.float64), is_grads_batched=True)
    for found, right in zip(many, truth, strict=True):
        torch.testing.assert_close(found, torch.stack([right, 2 * right]))


def test_a_direct_callers_outputs_stay_as_they_are():
    leaves = [torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(2)]
    tail = (0.5, 0.5, 0, 0.5, True, True, True)
    outputs = OPS.attention_map_divergence(*leaves, *torch.randn(2, 1, 2, 9, 4), None, *tail)
    kept = outputs[1].clone()
    grad, _ = torch.autograd.grad(3 * outputs[0], leaves)
    assert torch.equal(outputs[1], kept)
    assert torch.equal(grad, 3 * kept)


def test_dtypes_are_promoted_and_autocast_gives_float32():
    q, k, q_t, k_t = (torch.randn(2, 6, 4) for _ in range(4))
    assert attention_map_divergence(q, k, q_t.bfloat16(), k_t.half()).dtype == torch.float32
    half = [x.bfloat16() for x in (q, k, q_t, k_t)]
    assert attention_map_divergence(*half).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = [attention_map_divergence(*half, backend=backend) for backend in ("auto", "reference")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)  # float32, too


def test_the_mean_of_no_rows_is_nan():
    q, k = torch.randn(2, 0, 4), torch.randn(2, 3, 4, requires_grad=True)
    loss = attention_map_divergence(q, k, q, k.detach())
    assert loss.isnan()
    assert attention_map_divergence(q, k, q, k.detach(), reduction="sum") == 0


@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd", "ce"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_vmap_a_row_without_keys_is_nan(backend, kind):
    q, k = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    mask = (torch.arange(5) != 2)[:, None].expand(2, 5, 6)

    def rows(q, k, mask):
        return attention_map_divergence(q, k, q, k, mask=mask, kind=kind, reduction="none", backend=backend)

    loss = torch.func.vmap(rows)(q, k, mask)
    assert torch.equal(loss.isnan(), ~mask[..., 0])


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_on_every_instruction_set(isa, run_with_isa):
    """In a separate process, as the set is chosen once."""
    program = """
import torch
from pydistill import reference
from pydistill.ops import attention_map_divergence
torch.manual_seed(0)
for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
    q, k, q_t, k_t = (torch.randn(2, 61, 13, dtype=dtype) for _ in range(4))
    for kind in ("fkl", "rkl", "jsd", "ce"):
        found = []
        for function in (attention_map_divergence, reference.attention_map_divergence):
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            loss = function(*leaves, q_t, k_t, kind=kind)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*found):
            assert (a - b).norm() <= bound * b.norm(), (dtype, kind, (a - b).norm() / b.norm())
"""
    run_with_isa(isa, program)


Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
BAD = [
    ({"q_s": 1}, TypeError, "q_s: expected a tensor, got int"),
    ({"k_t": K.long()}, TypeError, "k_t: expected float32, float64, bfloat16 or float16, got torch.int64"),
    ({"q_s": Q[0, 0, 0]}, ValueError, r"q_s: expected \[..., N, d_s\] with a feature at least, got \[8\]"),
    ({"k_s": K[..., :0, :]}, ValueError, r"k_s: expected \[..., M, d_s\] with a key and a feature at least"),
    ({"q_t": Q.to("meta")}, ValueError, "q_t: expected device cpu as q_s, got meta"),
    ({"q_t": Q[:, :2]}, ValueError, r"q_t: expected leading dimensions \(heads\) \[2, 3\] and 4 queries as q_s, got "
                                    r"\[2, 2\] and 4"),
    ({"k_s": K[:, :2]}, ValueError, r"k_s: expected leading dimensions \(heads\) \[2, 3\] as q_s, or none, got "
     r"\[2, 2\]"),
    ({"k_t": K[0]}, ValueError, r"k_t: expected leading dimensions \(heads\) \[2, 3\] as q_s, or none, got \[3\]"),
    ({"k_s": K[..., :7]}, ValueError, "k_s: expected 8 features as q_s, got 7"),
    ({"k_t": K[..., :4, :]}, ValueError, "k_t: expected 5 keys as k_s, got 4"),
    ({"q_t": Q.clone().requires_grad_()}, ValueError, r"q_t: expected a teacher without gradient.*pass q_t.detach\(\)"),
    ({"k_t": K.clone().requires_grad_()}, ValueError, r"k_t: expected a teacher without gradient.*pass k_t.detach\(\)"),
    ({"kind": "kl"}, ValueError, "kind: expected 'fkl', 'rkl', 'jsd' or 'ce', got 'kl'"),
    ({"reduction": "max"}, ValueError, "reduction: expected 'batchmean', 'sum' or 'none', got 'max'"),
    ({"beta": 1.0}, ValueError, "beta: expected a number between 0 and 1, got 1.0"),
    ({"T_s": 0.0}, ValueError, "T_s: expected a positive number, got 0.0"),
    ({"T_t": math.nan}, ValueError, "T_t: expected a positive number, got nan"),
    ({"mask": torch.ones(4, 5)}, TypeError, "mask: expected a bool tensor, got torch.float32"),
    ({"mask": torch.ones(5, 4, dtype=torch.bool)}, ValueError, r"mask: expected a shape that broadcasts to "
                                                              r"\[2, 3, 4, 5\], got \[5, 4\]"),
    ({"mask": torch.tensor(True)}, ValueError, "mask: expected .* got a scalar"),
    ({"mask": torch.eye(4, 5).bool() & (torch.arange(4) != 2)[:, None]}, ValueError,
     r"mask: expected a key at True in every row, got none in row \[2\] of \[4, 5\]"),
    ({"backend": "cuda"}, NotImplementedError, "attention_map_divergence has no cuda kernel"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(change, error, message):
    arguments = {"q_s": Q, "k_s": K, "q_t": Q, "k_t": K} | change
    tensors = [arguments.pop(name) for name in ("q_s", "k_s", "q_t", "k_t")]
    with pytest.raises(error, match=message):
        attention_map_divergence(*tensors, **arguments)


def test_a_direct_call_is_checked_too():
    tail = (1.0, 1.0, 0, 0.5)
    with pytest.raises(RuntimeError, match=r"k_s: expected \[2, 3, 5, 8\]"):
        OPS.attention_map_divergence(Q, K[..., :7], Q, K, None, *tail, False, False, False)
    with pytest.raises(RuntimeError, match="kind: expected 0"):
        OPS.attention_map_divergence(Q, K, Q, K, None, 1.0, 1.0, 4, 0.5, False, False, False)
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"mask: expected \[2, 3, 4, 5\]"):
        OPS.attention_map_divergence(Q, K, Q, K, mask[None, None], *tail, False, False, False)
    with pytest.raises(RuntimeError, match=r"grad: expected \[2, 3, 4\]"):
        OPS.attention_map_divergence_backward(torch.ones(4), Q, K, Q, K, None, *tail, True, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype, kind):
    """The choice of "auto" there, against plain torch in float64 on the CPU."""
    tensors = [x.to(dtype) for x in (torch.randn(2, 3, n, d) for n, d in ((70, 40), (90, 40), (70, 64), (90, 64)))]
    mask = torch.rand(90) < 0.7
    found = []
    functions = attention_map_divergence, reference.attention_map_divergence
    for device, wanted, function in zip(("cuda", "cpu"), (dtype, torch.float64), functions, strict=True):
        q_s, k_s, q_t, k_t = (x.to(device, wanted) for x in tensors)
        leaves = [x.requires_grad_() for x in (q_s, k_s)]
        loss = function(*leaves, q_t, k_t, kind=kind, mask=mask.to(device), reduction="sum")
        found.append([x.detach().cpu().double() for x in (loss, *torch.autograd.grad(loss, leaves))])
    bound = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).norm() <= bound * truth.norm()


def test_an_operator_without_cuda_kernel_takes_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_operator._library, "unavailable", lambda backend, device: None)
    available = ("reference", "cpu", "triton")
    assert _operator.choose_backend("op", "auto", torch.device("cuda"), available) == "triton"
    assert _operator.choose_backend("op", "auto", torch.device("cuda"), (*available, "cuda")) == "cuda"
    with pytest.raises(NotImplementedError, match="op has no cuda kernel; it has reference, cpu"):
        _operator.choose_backend("op", "auto", torch.device("cuda"), ("reference", "cpu"))
