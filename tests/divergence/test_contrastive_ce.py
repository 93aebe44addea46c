"""The contrastive cross entropy against literal loops, its special cases, and the messages."""

import pytest
import torch
import torch.nn.functional as F

from pydistill.divergence import contrastive, contrastive_ce
from tests.repeats import check_from_run_to_run

SCALE = 1 / 0.07


def literal(q, k, scale, labels, labels_k, exclude_self=False):
    """Row by row and positive by positive; NaN for a row without one."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    losses = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if not (exclude_self and i == j)]
        similarities = {j: scale * (q[i] * k[j]).sum() for j in seen}
        total = torch.stack(list(similarities.values())).exp().sum().log()
        positives = [j for j in seen if labels[i] == labels_k[j]]
        losses.append(-sum(similarities[p] - total for p in positives) / max(1, len(positives)) + 0 * total)
    return torch.stack(losses)


def rows(*sizes, dtype=torch.float64, d=5):
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes]


def same_with_gradients(found, truth, inputs, **tolerance):
    torch.testing.assert_close(found, truth, **tolerance)
    weights = torch.linspace(0.5, 2, found.numel(), dtype=found.dtype).view(found.shape)
    for a, b in zip(
        *(torch.autograd.grad((f * weights).sum(), inputs, retain_graph=True) for f in (found, truth)), strict=True
    ):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(params=["one block", "a row at a time", "uneven blocks"])
def _blocks(request, monkeypatch):
    elements = {"one block": 1 << 20, "a row at a time": 1, "uneven blocks": 40}[request.param]
    monkeypatch.setattr(contrastive, "_ELEMENTS_AT_ONCE", elements)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("exclude_self", [False, True])
def test_classes_of_any_size(exclude_self):
    q, k = rows(7, 7)
    labels, labels_k = torch.tensor([0, 0, 3, 1, 1, 1, 5]), torch.tensor([0, 3, 3, 1, 0, 1, 7])
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    options = {"labels": labels, "labels_k": labels_k, "exclude_self": exclude_self}
    found = contrastive_ce(q, k, scale=scale, reduction="none", **options)
    truth = literal(q, k, scale, labels, labels_k, exclude_self)
    same_with_gradients(found, truth, (q, k, scale))
    assert found[-1] == 0  # no key has its class
    positives = [any(labels_k[j] == labels[i] and not (exclude_self and i == j) for j in range(7)) for i in range(7)]
    assert 0 < sum(positives) < 7
    torch.testing.assert_close(contrastive_ce(q, k, scale=scale, **options), truth.sum() / sum(positives))
    torch.testing.assert_close(contrastive_ce(q, k, scale=scale, reduction="sum", **options), truth.sum())


@pytest.mark.usefixtures("_blocks")
def test_supcon_of_two_views():
    """As in its paper: the anchors are all rows, the positives the others of a class."""
    (q,) = rows(10)
    y = torch.tensor([0, 1, 2, 1, 0])
    labels = y.repeat(2)
    found = contrastive_ce(q, None, scale=SCALE, labels=labels, exclude_self=True)
    same_with_gradients(found, literal(q, q, SCALE, labels, labels, True).mean(), (q,), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_blocks")
def test_infonce_and_clip_are_their_one_liners():
    q, k = rows(6, 6)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    s = scale * F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    forward, backward = (F.cross_entropy(matrix, torch.arange(6)) for matrix in (s, s.T))
    same_with_gradients(contrastive_ce(q, k, scale=scale), forward, (q, k, scale))
    same_with_gradients(contrastive_ce(q, k, scale=scale, symmetric=True), (forward + backward) / 2, (q, k, scale))
    plain = F.cross_entropy(0.3 * q @ k.T, torch.arange(6), reduction="none")
    same_with_gradients(contrastive_ce(q, k, scale=0.3, normalise=False, reduction="none"), plain, (q, k))


def test_more_keys_than_queries():
    q, k = rows(3, 8)
    labels, labels_k = torch.tensor([1, 0, 1]), torch.arange(8) % 2
    options = {"labels": labels, "labels_k": labels_k}
    forward, backward = literal(q, k, 4.0, labels, labels_k).mean(), literal(k, q, 4.0, labels_k, labels).mean()
    same_with_gradients(contrastive_ce(q, k, scale=4.0, **options), forward, (q, k))
    found = contrastive_ce(q, k, scale=4.0, symmetric=True, **options)
    same_with_gradients(found, (forward + backward) / 2, (q, k))


def test_gradcheck_and_a_loud_second_derivative():
    q, k = rows(4, 5, d=3)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    options = {"labels": torch.tensor([0, 1, 1, 2]), "labels_k": torch.tensor([1, 0, 1, 2, 2])}
    assert torch.autograd.gradcheck(lambda q, k, s: contrastive_ce(q, k, scale=s, **options), (q, k, scale))
    (grad,) = torch.autograd.grad(contrastive_ce(q, k, scale=scale, **options), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="contrastive_ce is differentiable once, not more"):
        grad.square().sum().backward()
    of_func = torch.func.grad(lambda q: contrastive_ce(q, k.detach(), scale=1.5, **options))(q.detach())
    torch.testing.assert_close(of_func, grad.detach())


def test_far_similarities_do_not_overflow():
    q = torch.eye(4).requires_grad_()
    loss = contrastive_ce(q, -q.detach(), scale=1e4)
    assert loss == 1e4 + torch.tensor(3.0).log()
    assert torch.autograd.grad(loss, q)[0].isfinite().all()


def test_a_query_that_sees_no_key_counts_nothing():
    (q,) = rows(1)
    loss = contrastive_ce(q, None, scale=1.0, labels=torch.tensor([0]), exclude_self=True, reduction="sum")
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, q)[0], torch.zeros_like(q))


def test_compiled():
    q, k = rows(6, 6)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(q, k, scale):
        return contrastive_ce(q, k, scale=scale, labels=torch.arange(6) % 3, exclude_self=True, symmetric=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same_with_gradients(compiled(q, k, scale), loss(q, k, scale), (q, k, scale))

    def supcon(q):
        return contrastive_ce(q, None, scale=SCALE, labels=torch.arange(6) % 3, exclude_self=True)

    same_with_gradients(torch.compile(supcon, fullgraph=True, backend="aot_eager")(q), supcon(q), (q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    q, k = rows(33, 33, dtype=dtype, d=64)
    labels = torch.arange(33) % 4
    truth_inputs = [t.detach().double().requires_grad_() for t in (q, k)]
    options = {"scale": SCALE, "labels": labels, "exclude_self": True}
    found, truth = contrastive_ce(q, k, **options), contrastive_ce(*truth_inputs, **options)
    assert found.dtype == torch.float32
    assert float((found - truth).detach().abs() / truth.detach()) < 1e-5
    for a, b in zip(torch.autograd.grad(found, (q, k)), torch.autograd.grad(truth, truth_inputs), strict=True):
        assert a.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 2 * float((b.to(dtype).double() - b).norm() / b.norm())
        assert float((a.double() - b).norm() / b.norm()) <= bound
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_ce(q, k, **options), found)


def test_equal_bits_from_run_to_run():
    q, k = rows(300, 500, dtype=torch.float32, d=96)
    options = {"scale": SCALE, "labels": torch.arange(300) % 7, "labels_k": torch.arange(500) % 7}

    def run():
        loss = contrastive_ce(q, k, **options)
        return loss, *torch.autograd.grad(loss, (q, k))

    check_from_run_to_run(run)


def test_nothing_of_the_size_of_all_pairs_is_kept():
    q, k = rows(64, 4096, dtype=torch.float32, d=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        contrastive_ce(q, k, scale=SCALE, labels=torch.arange(64) % 5, labels_k=torch.arange(4096) % 5)
    assert max(kept) == 8 * 4096


Q, K, Y = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, K), {}, TypeError, "q: expected a tensor, got NoneType"),
        ((Q, K.int()), {}, TypeError, "k: expected float32, float64, bfloat16 or float16, got torch.int32"),
        ((Q[0], K), {}, ValueError, r"q: expected \[rows, d\] with at least one row, got \[3\]"),
        ((Q, K[:0]), {}, ValueError, r"k: expected \[rows, d\] with at least one row, got \[0, 3\]"),
        ((Q, K[:, 1:]), {}, ValueError, r"k: expected torch.float32 \[M, 3\] on cpu as q, got torch.float32 \[4, 2\]"),
        ((Q, K.double()), {}, ValueError, "k: expected torch.float32 .*, got torch.float64"),
        ((Q, K), {"scale": torch.ones(2)}, ValueError, r"scale: expected a number or a scalar tensor, got \[2\]"),
        ((Q, K), {"labels": Y.float()}, TypeError, "labels: expected int64 class numbers, got torch.float32"),
        ((Q, K), {"labels": [0, 1]}, TypeError, "labels: expected int64 class numbers, got list"),
        ((Q, K), {"labels": Y[1:]}, ValueError, r"labels: expected \[4\] on cpu, got \[3\]"),
        ((Q, K), {"labels": Y, "labels_k": Y[1:]}, ValueError, r"labels_k: expected \[4\] on cpu, got \[3\]"),
        ((Q, K), {"labels_k": Y}, ValueError, "labels: expected those of the queries with labels_k, got None"),
        ((Q, None), {}, ValueError, "labels: expected class numbers where q is its own k, got None"),
        ((Q, None), {"labels": Y, "labels_k": Y}, ValueError, "labels_k: expected None where q is its own k"),
        ((Q, None), {"labels": Y, "symmetric": True}, ValueError, "symmetric: expected False where q is its own k"),
        ((Q, K[1:]), {}, ValueError, "k: expected as many rows as q, 4, to pair them, got 3"),
        ((Q, K[1:]), {"labels": Y}, ValueError, "labels_k: expected class numbers for 3 keys of 4 queries, got None"),
        ((Q, K), {"exclude_self": True}, ValueError, "exclude_self: expected False without labels"),
        ((Q, K), {"reduction": "max"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        contrastive_ce(*args, **{"scale": 1.0, **options})
