"""Adam as the unroll's optimiser, and warm-up: exact equals autograd through all steps, and those are torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory import Adam, FlatModule

E, N, K, T = 3, 9, 4, 7
ADAM = Adam()
OTHER = Adam(0.7, 0.95, 1e-3)


class Smooth(nn.Module):
    """No parameter's gradient is only rounding."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3 * 36, K)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(1))


def problem(net, students=None, label_kind="logits"):
    torch.manual_seed(0)
    net = net().double()
    start = FlatModule(net).parameters()
    theta0 = start if students is None else start + 0.1 * torch.randn(students, len(start), dtype=torch.float64)
    images = torch.randn(N, 2, 8, 8, dtype=torch.float64)
    labels = torch.randn(N, K, dtype=torch.float64) if label_kind == "logits" else torch.arange(N) % K
    return net, theta0, images, labels, torch.tensor(0.02, dtype=torch.float64)


def convnet():
    return ConvNet(2, K, width=5, depth=2, image_size=8)


def outer_loss(net, thetas):
    """From each student's test loss and its parameters, with different weights at different steps."""
    x = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = 0.0
    for weight, theta in enumerate(thetas, 1):
        for row in theta if theta.dim() == 2 else theta[None]:
            loss = loss + weight * F.cross_entropy(FlatModule(net)(row, x), torch.arange(6) % K)
            loss = loss + 0.1 * row[::3].sin().sum()
    return loss


def gradients(mode, *, net=Smooth, students=None, label_kind="logits", at=None, lr=None, **options):
    net, theta0, images, labels, rate = problem(net, students, label_kind)
    lr = rate if lr is None else lr
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in (theta0, images, labels, lr)]
    at = at or (T,)
    options = {"steps": T, "generator": torch.Generator().manual_seed(1), **options}
    thetas = pydistill.unroll(net, *inputs, label_kind=label_kind, mode=mode, at=at, **options)
    leaves = [t for t in inputs if t.requires_grad]
    return [*(t.detach() for t in thetas), *torch.autograd.grad(outer_loss(net, thetas), leaves)]


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


OPTIONS = {
    "default": {},
    "other numbers": {"optimizer": OTHER},
    "no first moment": {"optimizer": Adam(0.0, 0.9)},
    "no second moment": {"optimizer": Adam(0.5, 0.0, 1e-2)},
    "batches": {"batch_size": 4},
    "weight decay": {"batch_size": 4, "weight_decay": 0.1},
    "loss scale": {"loss_scale": 0.3, "weight_decay": 0.1},
    "hard labels": {"label_kind": "hard", "batch_size": 4},
    "several steps looked at": {"at": (2, 5, 7), "batch_size": 4},
    "store every third": {"store_every": 3, "batch_size": 4, "at": (3, 7)},
    "store on the host, every second": {"store": "host", "store_every": 2, "weight_decay": 0.1},
    "store no more than the start": {"store_every": 20},
    "warm-up": {"warmup": 3, "batch_size": 4},
    "warm-up, store every second": {"warmup": 2, "store_every": 2, "weight_decay": 0.1, "at": (3, 7)},
    "window of one step": {"warmup": 6},
    "students": {"students": E, "batch_size": 4, "lr": torch.tensor([0.01, 0.03, 0.02], dtype=torch.float64)},
    "students with one rate": {"students": E, "store_every": 2, "warmup": 1},
}
SGD_WARMUP = {
    "sgd": {"warmup": 3},
    "sgd, store every second": {"warmup": 2, "store_every": 2, "at": (4, 7)},
    "momentum": {"warmup": 3, "momentum": 0.9, "weight_decay": 0.1, "batch_size": 4},
    "momentum, store every third": {"warmup": 2, "momentum": 0.9, "store_every": 3, "students": E, "batch_size": 4},
}
CASES = {**{k: {"optimizer": ADAM, **v} for k, v in OPTIONS.items()}, **SGD_WARMUP}


def compare(options, net, tolerance, **exact):
    truth = gradients("full", net=net, **{k: v for k, v in options.items() if not k.startswith("store")})
    actual = gradients("exact", net=net, **options, **exact)
    assert len(actual) == len(truth)
    first = len(options.get("at", (T,)))
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        if i == first and options.get("warmup"):  # theta0
            assert a.count_nonzero() == t.count_nonzero() == 0
        else:
            assert relative(a, t) < tolerance, i


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_exact_equals_full(options):
    compare(options, Smooth, 1e-10)


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("options", [*CASES.values()][::2], ids=[*CASES][::2])
def test_exact_equals_full_on_convnets(options, engine):
    """A bias before an instance norm has a gradient of rounding errors alone, so eps is larger than those."""
    if options.get("optimizer") == ADAM:
        options = {**options, "optimizer": Adam(eps=1e-4)}
    compare(options, convnet, 1e-9, engine=engine)


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adam", [ADAM, OTHER])
def test_the_steps_are_those_of_torch(mode, weight_decay, adam):
    net, theta0, images, labels, lr = problem(Smooth)
    found = pydistill.unroll(
        net,
        theta0,
        images,
        labels,
        lr,
        steps=T,
        label_kind="logits",
        mode=mode,
        optimizer=adam,
        weight_decay=weight_decay,
    )
    settings = {"betas": (adam.beta1, adam.beta2), "eps": adam.eps, "weight_decay": weight_decay}
    optimizer = torch.optim.Adam(net.parameters(), lr.item(), **settings)
    for _ in range(T):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels.softmax(1)).backward()
        optimizer.step()
    assert relative(found.detach() - theta0, FlatModule(net).parameters() - theta0) < 1e-12


def literal(theta0, images, labels, lr, net, adam, weight_decay, warmup):
    flat, theta = FlatModule(net), theta0.detach().clone().requires_grad_()
    m = v = torch.zeros_like(theta)
    start = theta
    for t in range(1, T + 1):
        loss = F.cross_entropy(flat(theta, images), labels.softmax(1))
        q = torch.autograd.grad(loss, theta, create_graph=True)[0] + weight_decay * theta
        m, v = adam.beta1 * m + (1 - adam.beta1) * q, adam.beta2 * v + (1 - adam.beta2) * q * q
        m_hat, v_hat = m / (1 - adam.beta1**t), v / (1 - adam.beta2**t)
        theta = theta - lr * m_hat / (v_hat.sqrt() + adam.eps)
        if t == warmup:
            theta, m, v = theta.detach().requires_grad_(), m.detach(), v.detach()
    return start, theta


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_gradients_of_a_literal_loop(mode, warmup):
    net, theta0, images, labels, lr = problem(Smooth)
    leaves = [t.clone().requires_grad_() for t in (images, labels, lr)]
    start, theta = literal(theta0, *leaves, net, OTHER, 0.1, warmup)
    wanted = leaves if warmup else [start, *leaves]
    expected = torch.autograd.grad(outer_loss(net, [theta]), wanted)
    found = gradients(mode, optimizer=OTHER, weight_decay=0.1, warmup=warmup)[1:]
    for a, t in zip(found[1:] if warmup else found, expected, strict=True):
        assert relative(a, t) < 1e-10


def test_first_order_takes_parameters_for_constants_and_differentiates_moments():
    net, theta0, images, labels, lr = problem(Smooth)
    flat, adam, X = FlatModule(net), OTHER, images.clone().requires_grad_()
    theta, m, v = theta0, 0.0, 0.0
    total = theta0
    for t in range(1, T + 1):
        at = theta.detach().requires_grad_()
        q = torch.autograd.grad(F.cross_entropy(flat(at, X), labels.softmax(1)), at, create_graph=True)[0]
        m, v = adam.beta1 * m + (1 - adam.beta1) * q, adam.beta2 * v + (1 - adam.beta2) * q * q
        total = total - lr * (m / (1 - adam.beta1**t)) / ((v / (1 - adam.beta2**t)).sqrt() + adam.eps)
        theta = total
    (expected,) = torch.autograd.grad(outer_loss(net, [total]), X)
    found = gradients("first_order", optimizer=adam)[2]
    assert relative(found, expected) < 1e-10
    assert relative(found, gradients("exact", optimizer=adam)[2]) > 1e-3


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, K)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(x.flatten(1)) + 0 * self.unused.sum()


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_zero_gradients_have_the_derivative_of_the_limit(mode):
    """A pixel that is zero in all images: its weights' gradients are zero, and change with the pixel."""
    torch.manual_seed(0)
    net = Linear().double()
    theta0 = FlatModule(net).parameters()
    images = torch.randn(5, 2, 2, 2, dtype=torch.float64)
    images[:, 1, 1, 1] = 0
    weights = torch.randn(len(theta0), dtype=torch.float64)

    def loss(x, steps=3):
        options = {"steps": steps, "optimizer": Adam(eps=1e-2), "mode": mode}
        return pydistill.unroll(net, theta0, x, torch.arange(5) % K, 0.1, **options) @ weights

    X = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(X), X)
    assert found.isfinite().all()
    h = 1e-6
    for b in range(5):
        step = torch.zeros_like(images)
        step[b, 1, 1, 1] = h
        slope = (loss(images + step) - loss(images - step)) / (2 * h)
        assert abs(slope - found[b, 1, 1, 1]) < 1e-3 * abs(slope)
        assert abs(slope) > 1e-2


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_all_zero_gradients_are_finite_in_float32(mode):
    net = Linear()
    theta0, images = FlatModule(net).parameters().requires_grad_(), torch.zeros(5, 2, 2, 2, requires_grad=True)
    theta = pydistill.unroll(net, theta0, images, torch.arange(5) % K, 0.1, steps=4, optimizer=ADAM, mode=mode)
    found = torch.autograd.grad(theta.square().sum(), (theta0, images))
    assert all(g.isfinite().all() for g in found)
    assert found[1].count_nonzero() > 0
    torch.testing.assert_close(found[0][:3], 2 * net.unused.detach())


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_students_at_once_are_those_one_by_one(engine, warmup):
    net, theta0, images, labels, lr = problem(convnet, E)
    options = {"steps": T, "label_kind": "logits", "optimizer": OTHER, "engine": engine, "warmup": warmup}
    X, start = images.clone().requires_grad_(), theta0.clone().requires_grad_()
    together = pydistill.unroll(net, start, X, labels, lr, **options)
    found = torch.autograd.grad(outer_loss(net, [together]), (start, X))
    images_total = torch.zeros_like(images)
    for e in range(E):
        x, row = images.clone().requires_grad_(), theta0[e].clone().requires_grad_()
        alone = pydistill.unroll(net, row, x, labels, lr, **options)
        own = torch.autograd.grad(outer_loss(net, [alone]), (row, x))
        torch.testing.assert_close(together[e], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[0][e], own[0], rtol=1e-8, atol=1e-10)
        images_total += own[1]
    assert relative(found[1], images_total) < 1e-9


def test_warm_up_starts_where_a_shorter_unroll_ends():
    net, theta0, images, labels, lr = problem(Smooth)
    options = {"label_kind": "logits", "momentum": 0.9}
    whole = pydistill.unroll(net, theta0, images, labels, lr, steps=T, **options)
    for mode in ("exact", "full", "first_order"):
        X = images.clone().requires_grad_()
        found = pydistill.unroll(net, theta0, X, labels, lr, steps=T, warmup=4, mode=mode, **options)
        assert relative(found.detach(), whole) < 1e-13


def test_divergence_is_found_in_the_warm_up_too():
    net, theta0, images, labels, _ = problem(Smooth)
    X = images.clone().requires_grad_()
    for every in (1, 2):
        with pytest.raises(FloatingPointError, match="in step 3 of 6"):
            pydistill.unroll(
                net,
                theta0,
                X,
                labels,
                1e308,
                steps=6,
                warmup=4,
                label_kind="logits",
                store_every=every,
            )


def test_the_gradient_of_full_is_differentiable_again():
    net, theta0, images, labels, lr = problem(Smooth)
    X = images.clone().requires_grad_()
    theta = pydistill.unroll(net, theta0, X, labels, lr, steps=2, label_kind="logits", optimizer=OTHER, mode="full")
    (grad,) = torch.autograd.grad(theta.sin().sum(), X, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), X)
    assert second.isfinite().all()
    assert second.count_nonzero() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, ValueError, "optimizer: expected 'sgd' or a pydistill.trajectory.Adam, got 'adam'"),
        ({"optimizer": ADAM, "momentum": 0.9}, ValueError, r"momentum: expected 0 with Adam\(.*\), .* got 0\.9"),
        ({"warmup": 5}, ValueError, "warmup: expected at least 0 and fewer than 5 steps, got 5"),
        ({"warmup": -1}, ValueError, "warmup: expected at least 0 and fewer than 5 steps, got -1"),
        ({"warmup": 1.0}, TypeError, "warmup: expected an int, got float"),
        ({"warmup": 3, "at": (3,)}, ValueError, r"at: expected step numbers in 4\.\.5, after the warmup of 3, got 3"),
    ],
)
def test_refusals(options, error, message):
    net, theta0, images, labels, lr = problem(Smooth)
    with pytest.raises(error, match=message):
        pydistill.unroll(net, theta0, images, labels, lr, steps=5, label_kind="logits", **options)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"beta1": 1.0}, ValueError, r"beta1: expected a number in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, ValueError, r"beta2: expected a number in \[0, 1\), got -0\.1"),
        ({"eps": 0.0}, ValueError, r"eps: expected a positive finite number, got 0\.0"),
        ({"eps": "1"}, TypeError, "eps: expected a number, got str"),
    ],
)
def test_wrong_numbers_of_adam(numbers, error, message):
    with pytest.raises(error, match=message):
        Adam(**numbers)
