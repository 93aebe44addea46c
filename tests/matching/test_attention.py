"""Attention matching against the loops of the papers' code, on features and on what the engine gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill import attention_match, matching
from pydistill.nn import ConvNet
from pydistill.trajectory import FlatModule


def maps_of(f, p, norm, axis):
    dims = {"spatial": 1, "channel": (2, 3)}[axis]
    maps = f.abs().pow(p).sum(dims).flatten(1)
    return maps if norm == "none" else F.normalize(maps, p=2 if norm == "l2" else 1)


def literal(real, syn, y_real, y_syn, p, norm, axes):
    total = 0.0
    for axis in axes:
        for r, s in zip(real, syn, strict=True):
            a, b = maps_of(r, p, norm, axis), maps_of(s, p, norm, axis)
            for k in y_syn.unique():
                total = total + (a[y_real == k].mean(0) - b[y_syn == k].mean(0)).square().sum()
    return total


def problem(dtype=torch.float64):
    """Ragged classes in any order, two layers."""
    generator = torch.Generator().manual_seed(0)
    y_real, y_syn = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0]), torch.tensor([0, 1, 2, 1])
    real, syn = (
        [
            torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
            for c, h, w in ((5, 6, 4), (3, 3, 3))
        ]
        for n in (9, 4)
    )
    return real, [s.requires_grad_() for s in syn], y_real, y_syn


@pytest.mark.parametrize("norm", ["l2", "l1", "none"])
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("axis", ["spatial", "channel", "both"])
def test_loss_and_gradient_equal_the_loops(axis, p, norm):
    args = problem()
    syn = args[1]
    loss = attention_match(*args, p=p, norm=norm, axis=axis)
    truth = literal(*args, p, norm, ("spatial", "channel") if axis == "both" else (axis,))
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(loss, syn), torch.autograd.grad(truth, syn), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gradcheck_to_second_order():
    real, syn, y_real, y_syn = problem()
    function = lambda *s: attention_match(real, s, y_real, y_syn, p=4.0, axis="both", num_classes=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, syn, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, syn, fast_mode=True)


def test_reductions():
    args = problem()
    each = attention_match(*args, axis="both", reduction="none", num_classes=4)
    assert each.shape == (4, 4)
    assert torch.equal(each[:, 3], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(each.sum(), attention_match(*args, axis="both"))
    torch.testing.assert_close(each.sum() / 3, attention_match(*args, axis="both", reduction="mean", num_classes=4))


def test_half_precision_is_matched_in_float32():
    real, syn, *labels = problem(torch.bfloat16)
    loss = attention_match(real, syn, *labels)
    assert loss.dtype == torch.float32
    wide = attention_match([r.double() for r in real], [s.double() for s in syn], *labels)
    torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=0)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, syn))


def test_a_map_of_zeros_is_at_the_origin():
    real, syn = [torch.zeros(2, 3, 2, 2)], [torch.ones(2, 3, 2, 2, requires_grad=True)]
    labels = torch.tensor([0, 1])
    loss = attention_match(real, syn, labels, labels)
    torch.testing.assert_close(loss, torch.tensor(2.0))
    dead = [torch.zeros(2, 3, 2, 2, requires_grad=True)]
    assert torch.isfinite(torch.autograd.grad(attention_match(syn, dead, labels, labels), dead)[0]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r, s, a, b: (r, s[:1], a, b), ValueError, "feats_syn: expected 2 layers as feats_real, got 1"),
        (lambda r, s, a, b: ([], [], a, b), ValueError, "feats_syn: expected 1 layers as feats_real, got 0"),
        (
            lambda r, s, a, b: (r, [s[0], s[1][:, :2]], a, b),
            ValueError,
            r"feats_syn\[1\]: expected \[3, 3, 3\] a sample as feats_real\[1\], got \[2, 3, 3\]",
        ),
        (lambda r, s, a, b: (r[0], s, a, b), TypeError, "feats_real: expected a sequence of tensors"),
        (lambda r, s, a, b: ([r[0][0], r[1]], s, a, b), ValueError, r"feats_real\[0\]: expected \[N, C, H, W\], got"),
        (
            lambda r, s, a, b: (r, s, a, b.clamp_max(1)),
            ValueError,
            "labels_syn: expected rows of class 2, which labels_real has",
        ),
        (
            lambda r, s, a, b: (r, s, a.clamp_max(1), b),
            ValueError,
            "labels_real: expected rows of class 2, which labels_syn has",
        ),
        (lambda r, s, a, b: (r, s, a - 1, b), ValueError, r"labels_real: expected class numbers in 0\.\.2 .*, got -1"),
        (lambda r, s, a, b: (r, s, a[:4], b), ValueError, r"labels_real: expected \[9\].*, got \[4\]"),
        (lambda r, s, a, b: (r, s, a.float(), b), TypeError, "labels_real: expected int64 class numbers"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attention_match(*change(*problem()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"p: expected a finite number above zero, got 0\.0"),
        ({"p": -4.0}, r"p: expected a finite number above zero, got -4\.0"),
        ({"norm": "max"}, "norm: expected 'l2', 'l1' or 'none', got 'max'"),
        ({"axis": "time"}, "axis: expected 'spatial', 'channel' or 'both', got 'time'"),
        ({"reduction": "max"}, "reduction: expected 'sum', 'mean' or 'none', got 'max'"),
        ({"num_classes": 2}, r"labels_real: expected class numbers in 0\.\.1 for 2 classes, got 2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attention_match(*problem(), **options)


# ---- the network's features


def nets():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {
            "instance": ConvNet(1, 3, width=6, depth=2, image_size=10),
            "batch": ConvNet(1, 3, width=6, depth=2, image_size=10, norm="batch"),
            "none, leakyrelu, max": ConvNet(1, 3, 6, 2, 10, norm="none", act="leakyrelu", pool="max"),
        }


def observed(net, theta, x):
    """The activations and the embedding, as from the papers' hooks."""
    flat, found = FlatModule(net), []
    parameters = flat.unflatten(theta)
    for i, layer in enumerate(net.features):
        name = f"features.{i}"
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"], padding=layer.padding)
        elif f"{name}.weight" in parameters:  # a norm, alone or with what follows it
            weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
            if isinstance(layer, nn.BatchNorm2d):
                x = F.batch_norm(x, None, None, weight, bias, training=True)
            else:
                x = F.relu(F.group_norm(x, x.shape[1], weight, bias))
                found.append(x)
                x = F.avg_pool2d(x, 2)
        else:
            x = layer(x.clone())
            if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                found.append(x)
    return found, x.flatten(1)


@pytest.mark.parametrize("axis", ["spatial", "channel", "both", None])
@pytest.mark.parametrize("name", ["instance", "batch", "none, leakyrelu, max"])
def test_features_equal_those_of_hooks(name, axis):
    net = nets()[name].double()
    theta = FlatModule(net).parameters()
    x = torch.randn(5, 1, 10, 10, dtype=torch.float64, requires_grad=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = matching.features(net, theta, x, p=2.0, axis=axis, layers=(0, 1))
    activations, embedding = observed(net, theta, x)
    truth = matching.Features(
        tuple(a.square().sum(1).flatten(1) for a in activations if axis in ("spatial", "both")),
        tuple(a.square().sum((2, 3)) for a in activations if axis in ("channel", "both")),
        embedding,
    )
    for got, expected in zip((*found[0], *found[1], found[2]), (*truth[0], *truth[1], truth[2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
        grads = [torch.autograd.grad((t * weights).sum(), x, retain_graph=True)[0] for t in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_engine_and_autograd_agree_and_all_but_the_last_are_the_default():
    net = nets()["instance"].double()
    theta = FlatModule(net).parameters()
    x = torch.randn(5, 1, 10, 10, dtype=torch.float64)
    ours, plain = (matching.features(net, theta, x, axis="both", engine=engine) for engine in ("student", "generic"))
    assert len(ours.spatial) == len(ours.channel) == 1
    for a, b in zip((*ours[0], *ours[1], ours[2]), (*plain[0], *plain[1], plain[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.embedding, net.embed(x), rtol=1e-10, atol=1e-12)


def test_derivatives_that_the_engine_does_not_have():
    net = nets()["instance"]
    theta, x = FlatModule(net).parameters(), torch.randn(2, 1, 10, 10, requires_grad=True)
    found = matching.features(net, theta, x)
    with pytest.raises(NotImplementedError, match="differentiable once; engine='generic' goes further"):
        torch.autograd.grad(found.embedding.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="theta requires a gradient, which the features"):
        matching.features(net, theta.clone().requires_grad_(), x, engine="student")
    moved = theta.clone().requires_grad_()
    loss = matching.features(net, moved, x).embedding.sum()
    assert torch.autograd.grad(loss, moved)[0].norm() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": torch.ones(3)}, r"theta: expected shape \[\d+\] for this net, got \[3\]"),
        ({"images": torch.ones(2, 1, 10)}, r"images: expected \[N, C, H, W\] with at least one image, got"),
        ({"images": torch.ones(0, 1, 10, 10)}, r"images: expected \[N, C, H, W\] with at least one image, got"),
        (
            {"images": torch.ones(2, 1, 10, 10).double()},
            "images: expected torch.float32 on cpu as theta, got torch.float64",
        ),
        ({"axis": "time"}, "axis: expected 'spatial', 'channel', 'both' or None, got 'time'"),
        ({"p": 0.0}, "p: expected a finite number above zero"),
        ({"layers": (2,)}, r"layers: expected ascending numbers out of 0\.\.1, got \[2\]"),
        ({"layers": (2,), "engine": "generic"}, r"layers: expected ascending numbers out of 0\.\.1, got \[2\]"),
        ({"engine": "fast"}, "engine: expected 'auto', 'student', 'compiled' or 'generic', got 'fast'"),
    ],
)
def test_features_name_what_is_wrong(change, message):
    net = nets()["instance"]
    given = {"theta": FlatModule(net).parameters(), "images": torch.ones(2, 1, 10, 10)} | change
    with pytest.raises(ValueError, match=message):
        matching.features(net, **given)
