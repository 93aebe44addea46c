"""Losses at denormal, zero, infinite and large inputs: values and gradients against float64, on every backend."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import attention_map_divergence, kd_divergence, soft_cross_entropy
from pydistill.divergence import attention_nmi, contrastive_ce
from pydistill.ops import sparse_label_loss
from tests.divergence.edges import (
    KINDS,
    MASKED,
    ROWS,
    TEMPERATURES,
    check_attention,
    check_divergence,
    check_sparse,
    labels_of,
    log_softmax,
    product,
)
from tests.matrices import sample

BACKENDS = ["cpu", "reference"]
SAMPLED = sample(BACKENDS, ["cpu"])
DTYPES = [torch.float32, torch.float64]


# a distance to minus infinity is not defined
@pytest.mark.parametrize(("kind", "edge"), [(k, e) for k in KINDS for e in ROWS if k != "mse" or "masked" not in e])
@pytest.mark.parametrize("backend", SAMPLED)
def test_kd_divergence(backend, kind, edge):
    def loss(*args, **options):
        return kd_divergence(*args, backend=backend, **options)

    for T in TEMPERATURES:
        for probs in (False, True) if kind not in ("ce", "mse") else (False,):
            for dtype in DTYPES:
                check_divergence(loss, edge, kind, T, probs, dtype)


@pytest.mark.parametrize("edge", ROWS)
@pytest.mark.parametrize("backend", SAMPLED)
def test_sparse_label_loss(backend, edge):
    def loss(*args, **options):
        return sparse_label_loss(*args, backend=backend, **options)

    for T in TEMPERATURES:
        for dtype in DTYPES:
            check_sparse(loss, edge, T, dtype)


@pytest.mark.parametrize("kind", ["hard", "logits", "probs"])
@pytest.mark.parametrize("edge", ROWS)
@pytest.mark.parametrize("backend", SAMPLED)
def test_soft_cross_entropy(backend, edge, kind):
    for dtype in DTYPES:
        x, y = (t.to(dtype) for t in ROWS[edge])
        given = {"hard": labels_of(x), "logits": y, "probs": log_softmax(y).exp()}[kind]
        leaves = [x.clone().requires_grad_(), given.clone()]
        wide = [x.double().requires_grad_(), given.clone()]
        if kind != "hard":
            leaves[1].requires_grad_()
            wide[1] = given.double().requires_grad_()
        if kind == "hard":
            true = -product(F.one_hot(given, x.shape[1]).double(), log_softmax(wide[0])).sum(1)
        else:
            t, log_p = log_softmax(wide[1]).exp() if kind == "logits" else wide[1], log_softmax(wide[0])
            out = (t == 0) & (log_p == -torch.inf)
            true = -(t * torch.where(out, 0, log_p)).sum(1)
        loss = soft_cross_entropy(*leaves, label_kind=kind, reduction="none", backend=backend)
        size = 1 + true.detach().abs()
        bound = 32 * torch.finfo(dtype).eps * size
        assert (((loss - true).abs() <= bound) | (loss == true)).all()
        floating = [(a, b) for a, b in zip(leaves, wide, strict=True) if a.requires_grad]
        found, truth = (
            torch.autograd.grad(a.sum(), leaf, retain_graph=True)
            for a, leaf in ((loss, [a for a, _ in floating]), (true, [b for _, b in floating]))
        )
        finite = true.isfinite()  # elsewhere labels have no gradient
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            near = ((a - b).abs() <= (32 * torch.finfo(dtype).eps * (1 + size))[:, None]) | (a == b)
            assert near[finite if i else finite | True].all()


def test_a_class_masked_on_both_sides_takes_no_part_in_learned_labels():
    """Its label, which is zero, stays where it is, in reverse and forward mode."""
    x, y = (t.double() for t in ROWS["masked"])
    kept = [c for c in range(x.shape[1]) if c not in MASKED]
    for kind, labels in (("logits", y), ("probs", y.softmax(1))):
        for backend in BACKENDS:

            def loss(a, b, kind=kind, backend=backend):
                return soft_cross_entropy(a, b, label_kind=kind, reduction="sum", backend=backend)

            found, truth = [], []
            for columns, results in ((slice(None), found), (kept, truth)):
                a, b = (t[:, columns].clone().requires_grad_() for t in (x, labels))
                first = torch.autograd.grad(loss(a, b), (a, b), create_graph=True)
                second = torch.autograd.grad(sum(g.sin().sum() for g in first), (a, b))
                directions = [torch.linspace(-1, 1, x.shape[1]).double().expand_as(x)[:, columns]] * 2
                results += [*first, *second, torch.func.jvp(loss, (a.detach(), b.detach()), tuple(directions))[1]]
            for a, b in zip(found, truth, strict=True):
                if a.dim():
                    assert (a[:, MASKED] == 0).all()
                    a = a[:, kept]
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd", "ce"])
@pytest.mark.parametrize("backend", SAMPLED)
def test_attention_map_divergence(backend, kind):
    def loss(*args, **options):
        return attention_map_divergence(*args, backend=backend, **options)

    for dtype in DTYPES:
        check_attention(loss, kind, dtype)


FEATURES = {
    "zeros": torch.zeros(4, 6),
    "denormal": 1e-40 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    "constant": torch.full((4, 6), 0.1),
    "1e4": 1e4 * torch.tensor([[1, -1, 1, 1, 0, 1], [-1, 0, 1, 0, 1, 1], [0, 1, 1, -1, 1, 0], [1, 1, 0, 0, -1, 1.0]]),
    "one row": torch.tensor([[1.0, -2, 3, 0.5, 0, 1]]),
}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("edge", FEATURES)
def test_contrastive_ce(edge, normalise):
    q = FEATURES[edge]
    k = q.flip(1)
    for scale in (0.02, 1.0, 20.0):
        options = {"scale": scale, "labels": torch.arange(len(q)) // 2, "normalise": normalise}
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        wide = [t.double().requires_grad_() for t in (q, k)]
        a, b = (F.normalize(t, dim=1) for t in wide) if normalise else wide
        positive = (options["labels"][:, None] == options["labels"]).double()
        s = scale * a @ b.T
        true = (s.logsumexp(1) - (s * positive).sum(1) / positive.sum(1)).mean()
        loss = contrastive_ce(*leaves, **options)
        torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
        found, truth = torch.autograd.grad(loss, leaves), torch.autograd.grad(true, wide)
        # slopes of scores have rounding errors, and only their differences remain
        reach = (
            scale * float(a.detach().abs().max()) / (float(q.norm(dim=1).max().clamp_min(1e-12)) if normalise else 1)
        )
        for g, t in zip(found, truth, strict=True):
            torch.testing.assert_close(g.double(), t, rtol=1e-5, atol=1e-6 * reach + 1e-43)


@pytest.mark.parametrize("edge", FEATURES)
def test_attention_nmi(edge):
    q = FEATURES[edge]
    for k in (q, q[:1]):
        for tau in (0.05, 1.0, 50.0):
            p = log_softmax(q.double() @ k.double().T, tau).exp()
            mean = p.mean(0)
            shared, entropy = torch.special.entr(mean).sum(), torch.special.entr(p).sum(1).mean()
            true = (shared - entropy) / (torch.tensor(len(q)).log() * shared).sqrt() if shared > 0 and len(q) > 1 else 0
            # a quotient by the root of an entropy that may be a few roundings
            torch.testing.assert_close(float(attention_nmi(q, k, T=tau)), float(true), rtol=1e-4, atol=1e-3)
