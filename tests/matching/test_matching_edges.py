"""Matching losses at denormal, zero and large features, equal rows, one row: value and gradient against float64."""

import pytest
import torch
import torch.nn.functional as F

from pydistill import bn_stat_match, reference
from pydistill.matching import attention_match, class_mean_match, gradient_match, krr_loss, match_maps

R = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
EDGES = {
    "zeros": (torch.zeros(6, 8), torch.zeros(6, 8)),
    "zero beside others": (R[0], torch.zeros(6, 8)),
    "denormal": (1e-40 * R[0], 1e-40 * R[1]),
    "1e-15": (1e-15 * R[0], 1e-15 * R[1]),
    "1e4": (1e4 * R[0], 1e4 * R[1]),
    "one row": (R[0, :1], R[1, :1]),
    "constant": (torch.full((6, 8), 0.1), torch.full((6, 8), -3.0)),
    "equal": (R[0], R[0]),
    "identical rows": (R[0, :1].repeat(6, 1), R[1, :1].repeat(6, 1)),
}


def class_means(a, b):
    y = torch.arange(len(a)) % 3
    return sum((a[y == k].mean(0) - b[y == k].mean(0)).square().sum() for k in y.unique())


def with_labels(f, **options):
    return lambda a, b: f(a, b, *2 * [torch.arange(len(a)) % 3], **options)


def normalised(p):
    return lambda a, b: class_means(*(F.normalize(t, p=p, dim=1) for t in (a, b)))


def attention(p):
    return lambda a, b: class_means(*(F.normalize(t.view(-1, 2, 4).abs().pow(p).sum(1), dim=1) for t in (a, b)))


def row_cosines(a, b):
    lengths = [torch.where(t == 0, 0, t).norm(dim=1) for t in (a, b)]
    return (1 - (a * b).sum(1) / (lengths[0] * lengths[1] + 1e-6)).sum()


def of_maps(f, **options):
    return lambda a, b: f([a], [b], *2 * [torch.arange(len(a)) % 3], **options)


def of_features(p):
    return lambda a, b: attention_match(*([t.view(-1, 2, 2, 2)] for t in (a, b)), *2 * [torch.arange(len(a)) % 3], p=p)


LOSSES = {
    "class_mean_match": (with_labels(class_mean_match), class_means),
    "match_maps l2": (of_maps(match_maps), normalised(2)),
    "match_maps l1": (of_maps(match_maps, norm="l1"), normalised(1)),
    "match_maps none": (of_maps(match_maps, norm="none"), class_means),
    "attention_match p=1": (of_features(1.0), attention(1)),
    "attention_match p=4": (of_features(4.0), attention(4)),
    "gradient_match row_cos": (lambda a, b: gradient_match(grads_real=[a], grads_syn=[b]), row_cosines),
    "gradient_match cos": (
        lambda a, b: gradient_match(grads_real=[a], grads_syn=[b], kind="cos"),
        lambda a, b: row_cosines(a.reshape(1, -1), b.reshape(1, -1)),
    ),
    "gradient_match mse": (
        lambda a, b: gradient_match(grads_real=[a], grads_syn=[b], kind="mse"),
        lambda a, b: (a - b).square().sum(),
    ),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", LOSSES)
def test_against_float64(name, edge):
    ours, plain = LOSSES[name]
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype) for t in EDGES[edge])
        leaf, wide = b.clone().requires_grad_(), b.double().requires_grad_()
        loss, truth = ours(a, leaf), plain(a.double(), wide)
        rtol = 64 * torch.finfo(dtype).eps
        size = 1 if "mse" not in name and "none" not in name and "class" not in name else float(truth.detach())
        torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=rtol * size + 1e-40)
        (found,), (true,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(truth, wide)
        unit = float(b.abs().max()) or 1.0  # a gradient is in units of the loss over those of the features
        reach = max(float(true.abs().max()), size / unit if unit > 1e-6 else 0.0)
        torch.testing.assert_close(found.double(), true, rtol=rtol, atol=rtol * reach + 1e-40)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["norm", "sq"])
@pytest.mark.parametrize("edge", EDGES)
def test_bn_stat_match(edge, kind, backend):
    x, statistics = EDGES[edge]
    mean, var = statistics[0, :4], statistics[0, 4:].abs()
    for dtype in (torch.float32, torch.float64):
        leaf = x.reshape(-1, 4, 2).to(dtype).requires_grad_()
        wide = leaf.detach().double().requires_grad_()
        loss = bn_stat_match(leaf, mean.to(dtype), var.to(dtype), kind=kind, backend=backend)
        apart = wide.mean((0, 2)) - mean.double(), wide.var((0, 2), unbiased=False) - var.double()
        truth = sum(d.square().sum() if kind == "sq" else d.norm() for d in apart)
        rtol = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=1e-40)
        (found,), (true,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(truth, wide)
        if edge != "constant":  # whose variance is zero, or what float64 leaves of it: a norm has no slope there
            rtol = 1e-4 if edge == "denormal" else rtol  # they have so few digits
            torch.testing.assert_close(found.double(), true, rtol=rtol, atol=rtol * float(true.abs().max()) + 1e-40)
        assert found.isfinite().all()


@pytest.mark.parametrize("form", ["kernel", "weights", "primal"])
@pytest.mark.parametrize("edge", ["denormal", "1e-15", "1e4", "one row", "identical rows", "constant", "equal"])
def test_krr_loss(edge, form):
    """Its ridge is in units of the features: the loss depends on them as little as its definition does."""
    real, syn = EDGES[edge]
    y_syn, y_real = R[0, : len(syn), :3], R[1, : len(real), :3]
    leaf, wide = syn.clone().requires_grad_(), syn.double().requires_grad_()
    loss = krr_loss(real, leaf, y_real=y_real, y_syn=y_syn, form=form, lam=1e-2)
    truth = reference.krr_loss(real.double(), wide, y_real=y_real.double(), y_syn=y_syn.double(), lam=1e-2)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-6)
    if edge != "denormal":  # more than float32 holds
        (found,), (true,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(truth, wide)
        torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=1e-4 * float(true.abs().max()))
