"""The repositories' other ConvNets on the student engine: norms, activations and pools, against plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory import FlatModule, convnet_shape

KINDS = [
    {"norm": norm, "act": act, "pool": pool}
    for norm, act, pool in (
        ("instance", "leakyrelu", "avg"),
        ("instance", "relu", "max"),
        ("group", "relu", "avg"),
        ("batch", "relu", "avg"),
        ("batch", "leakyrelu", "max"),
        ("layer", "sigmoid", "none"),
        ("none", "relu", "max"),
    )
]


def name_of(kind):
    return "-".join(kind.values())


def problem(seed=0, classes=4, N=6, dtype=torch.float64, training=True, **kind):
    torch.manual_seed(seed)
    net = ConvNet(3, classes, width=8, depth=2, image_size=10, **kind).to(dtype).train(training)
    theta0 = FlatModule(net).parameters()
    images = torch.randn(N, 3, 10, 10, dtype=dtype)
    return net, theta0, images, torch.arange(N) % classes


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_trajectory_gradient(kind, training):
    """And a BatchNorm's final buffers, which a replay must not change."""
    net, theta0, images, labels = problem(training=training, **kind)
    if kind["norm"] != "batch" and not training:
        pytest.skip("no difference")
    target = theta0 + 0.1 * torch.randn_like(theta0)
    found = {}
    for engine, mode in (("student", "exact"), ("generic", "full")):
        its = copy.deepcopy(net)
        x, lr = images.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        options = {"engine": engine, "mode": mode, "steps": 4, "batches": [torch.arange(6)[i::2] for i in (0, 1, 0, 1)]}
        loss = pydistill.trajectory_match(its, theta0, target, x, labels, lr, **options)
        buffers = copy.deepcopy(dict(its.named_buffers()))
        found[engine] = (loss, *torch.autograd.grad(loss, (x, lr)), *its.buffers())
        assert all(torch.equal(b, buffers[name]) for name, b in its.named_buffers())
    for a, b in zip(found["student"], found["generic"], strict=True):
        assert relative(a, b) < 1e-10 if a.is_floating_point() else torch.equal(a, b)
    if kind["norm"] == "batch" and training:
        assert not torch.equal(found["student"][3], next(net.buffers()))


@pytest.mark.parametrize("store_every", [1, 3])
def test_students_at_once_move_running_statistics_in_turn(store_every):
    net, theta0, images, labels = problem(norm="batch")
    theta0 = theta0 + 0.05 * torch.randn(3, len(theta0), dtype=theta0.dtype)
    found = {}
    for engine in ("student", "generic"):
        its, x = copy.deepcopy(net), images.clone().requires_grad_()
        options = {"engine": engine, "steps": 4, "store_every": store_every}
        out = pydistill.unroll(its, theta0, x, labels, 0.1, **options)
        found[engine] = (out, torch.autograd.grad(out.square().sum(), x)[0], *its.buffers())
    for a, b in zip(found["student"], found["generic"], strict=True):
        assert relative(a, b) < 1e-10 if a.is_floating_point() else torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_batch_norms_momentum(momentum):
    net, theta0, images, labels = problem(norm="batch")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    plain = copy.deepcopy(net)
    pydistill.unroll(net, theta0, images, labels, 0.1, steps=3, engine="student")
    pydistill.unroll(plain, theta0, images, labels, 0.1, steps=3, engine="generic")
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        assert relative(a, b) < 1e-12 if a.is_floating_point() else torch.equal(a, b)


def test_batch_norm_that_tracks_nothing():
    net, theta0, images, labels = problem(norm="batch", training=False)
    for i, module in enumerate(net.features):
        if isinstance(module, nn.BatchNorm2d):
            net.features[i] = nn.BatchNorm2d(8, track_running_stats=False, dtype=torch.float64)
    shape = convnet_shape(net, (3, 10, 10), torch.float64)
    assert shape.norm == "batch"
    found = [pydistill.unroll(net, theta0, images, labels, 0.1, steps=3, engine=e) for e in ("student", "generic")]
    assert relative(*found) < 1e-11


def test_training_gives_each_student_statistics_of_its_own():
    net, theta0, images, labels = problem(norm="batch", N=10, training=False)
    before = copy.deepcopy(net.state_dict())
    theta0 = theta0 + 0.05 * torch.randn(3, len(theta0), dtype=theta0.dtype)
    options = {"epochs": 4, "batch_size": 4, "lr": 0.05, "momentum": 0.9, "eval_data": (images, labels)}
    found = {}
    for engine in ("student", "generic"):
        given = [torch.Generator().manual_seed(seed) for seed in range(3)]
        found[engine] = pydistill.train_students(
            net, theta0, images, labels, **options, generator=given, engine=engine, train_accuracy=True
        )
    ours, theirs = found["student"], found["generic"]
    assert relative(ours.theta, theirs.theta) < 1e-9
    assert relative(ours.losses, theirs.losses) < 1e-9
    assert torch.equal(ours.accuracy, theirs.accuracy)
    assert torch.equal(ours.train_accuracy, theirs.train_accuracy)
    assert ours.buffers.keys() == theirs.buffers.keys() == dict(net.named_buffers()).keys()
    for name, of_all in ours.buffers.items():
        truth = theirs.buffers[name]
        assert relative(of_all, truth) < 1e-9 if of_all.is_floating_point() else torch.equal(of_all, truth), name
    assert not torch.equal(ours.buffers["features.1.running_mean"][0], ours.buffers["features.1.running_mean"][1])
    assert all(torch.equal(b, before[name]) for name, b in net.state_dict().items())
    assert not net.training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", ["spatial", "both"])
def test_features_of_datadams_network(axis, training):
    net, theta, images, _ = problem(norm="batch", N=5, training=training)
    found = {}
    for engine in ("student", "generic"):
        x = images.clone().requires_grad_()
        out = pydistill.matching.features(net, theta, x, p=1.0, axis=axis, layers=(0, 1), engine=engine)
        rows = [*out.spatial, *out.channel, out.embedding]
        found[engine] = (*rows, *torch.autograd.grad(sum((row * row).sum() for row in rows), x))
    assert all(relative(a, b) < 1e-11 for a, b in zip(found["student"], found["generic"], strict=True))
    assert int(net.features[1].num_batches_tracked) == 0


def test_class_gradients_with_batch_norm():
    net, theta, images, labels = problem(norm="batch", N=8)
    found = {}
    for engine in ("student", "generic"):
        x = images.clone().requires_grad_()
        g = pydistill.matching.class_gradients(copy.deepcopy(net), theta, x, labels, engine=engine)
        found[engine] = (g, *torch.autograd.grad(g.square().sum(), x))
    assert all(relative(a, b) < 1e-10 for a, b in zip(found["student"], found["generic"], strict=True))
    with pytest.raises(ValueError, match="the classes have unequal numbers of images"):
        pydistill.matching.class_gradients(net, theta, images[:-1], labels[:-1], engine="student")
    assert pydistill.matching.class_gradients(net, theta, images[:-1], labels[:-1]).shape == found["student"][0].shape


def test_widths_that_double():
    """FRePo's network."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers, channels = [], 3
            for width in (8, 16, 32):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                layers.append(nn.AvgPool2d(2, 2))
                channels = width
            self.features, self.classifier = nn.Sequential(*layers), nn.Linear(32, 4)

        def forward(self, x):
            return self.classifier(torch.flatten(self.features(x), 1))

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(6, 3, 8, 8).double()
    theta, y = FlatModule(net).parameters(), torch.arange(6) % 4
    found = pydistill.unroll(net, theta, x, y, 0.1, steps=3, engine="student")
    assert relative(found, pydistill.unroll(net, theta, x, y, 0.1, steps=3, engine="generic")) < 1e-11


def test_a_literal_loop_with_batch_norm():
    """What MTT's loop does with a BatchNorm: training mode, its buffers updated at every step."""
    net, theta0, images, labels = problem(norm="batch")
    literal, x, theta = copy.deepcopy(net), images.clone().requires_grad_(), theta0.clone().requires_grad_()
    student = pydistill.compat.ReparamModule(literal)
    at = theta
    for _ in range(3):
        loss = F.cross_entropy(student(x, flat_param=at), labels)
        at = at - 0.1 * torch.autograd.grad(loss, at, create_graph=True)[0]
    (wanted,) = torch.autograd.grad(at.square().sum(), x)
    ours = images.clone().requires_grad_()
    out = pydistill.unroll(net, theta0, ours, labels, 0.1, steps=3, engine="student")
    (found,) = torch.autograd.grad(out.square().sum(), ours)
    assert relative(found, wanted) < 1e-10
    for a, b in zip(net.buffers(), literal.buffers(), strict=True):
        assert relative(a, b) < 1e-12 if a.is_floating_point() else torch.equal(a, b)
