"""Training with GSAM and with AST's smoothing is a plain loop that writes them out, student by student."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory import GSAM, FlatModule, Smoothing
from tests.trajectory.students import E, K, N, Noise, WithBatchNorm, generators


def problem(net=None):
    torch.manual_seed(0)
    net = (net or ConvNet(2, K, width=5, depth=2, image_size=8)).double()
    start = FlatModule(net).parameters()
    theta0 = start + 0.1 * torch.randn(E, len(start), dtype=torch.float64)
    return net, theta0, torch.randn(N, 2, 8, 8, dtype=torch.float64), torch.randint(K, (N,))


def literal_loop(net, theta, images, labels, *, epochs, lr, batch_size, generator, **options):
    net = copy.deepcopy(net).train()
    vector_to_parameters(theta.clone(), net.parameters())
    gsam, smoothing = options.get("sharpness"), options.get("smoothing") or Smoothing()
    augment, schedule = options.get("augment"), options.get("schedule") or (lambda epoch, epochs: 1.0)
    sgd = {"momentum": options.get("momentum", 0.0), "weight_decay": options.get("weight_decay", 0.0)}
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, **sgd)

    def backward(x, plain, y, decay, restore):
        before = copy.deepcopy(list(net.buffers()))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        objective = decay * loss
        if not restore:
            before = copy.deepcopy(list(net.buffers()))
        if smoothing.gradient_penalty:
            plain = plain.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(plain).sum(), plain, create_graph=True)
            objective = objective + smoothing.gradient_penalty * (slope.norm(dim=1) - 1).square().mean()
        objective.backward()
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)
        return loss.item(), parameters_to_vector([p.grad for p in net.parameters()])

    losses = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * schedule(epoch, epochs)
        decay = dict(enumerate(smoothing.loss_decay)).get(epoch, 1.0)
        total = 0.0
        for index in torch.randperm(N, generator=generator).split(batch_size):
            plain, y = images[index], labels[index]
            x = augment(plain, augment.draw(plain.shape, generator)) if augment else plain
            loss, grad = backward(x, plain, y, decay, False)
            if gsam is not None:
                here = parameters_to_vector(net.parameters()).detach()
                size = here.abs() if gsam.adaptive else torch.ones_like(here)
                there = here + gsam.rho * size**2 * grad / (size * grad).norm()
                vector_to_parameters(there, net.parameters())
                perturbed = backward(x, plain, y, decay, True)[1]
                vector_to_parameters(here, net.parameters())
                unit = perturbed / perturbed.norm()
                grad = perturbed - gsam.alpha * (grad - (grad @ unit) * unit)
            for p, g in zip(net.parameters(), grad.split([p.numel() for p in net.parameters()]), strict=True):
                p.grad = g.view_as(p).clone()
            if smoothing.clip_norm is not None:
                clip_grad_norm_(net.parameters(), smoothing.clip_norm)
            optimizer.step()
            total += loss * len(index)
        losses.append(total / N)
    return parameters_to_vector(net.parameters()).detach(), torch.tensor(losses, dtype=torch.float64), net


ALL = {"momentum": 0.9, "weight_decay": 0.05, "schedule": lambda epoch, epochs: 1 / (1 + epoch), "augment": Noise()}
OPTIONS = {
    "sam": {"sharpness": GSAM(0.1)},
    "gsam": {"sharpness": GSAM(0.1, 0.4)},
    "adaptive gsam": {"sharpness": GSAM(0.5, 0.4, adaptive=True)},
    "gsam with all": {"sharpness": GSAM(0.1, 0.4), **ALL},
    "loss decay": {"smoothing": Smoothing(loss_decay=(0.5, 0.7))},
    "more loss decay than epochs": {"smoothing": Smoothing(loss_decay=[0.1] * 9)},
    "clip": {"smoothing": Smoothing(clip_norm=0.5)},
    "decay and clip with gsam and all": {
        "smoothing": Smoothing(loss_decay=(0.5, 0.7), clip_norm=0.5),
        "sharpness": GSAM(0.1, 0.4),
        **ALL,
    },
    "penalty": {"smoothing": Smoothing(2.0)},
    "penalty with augmentation": {"smoothing": Smoothing(2.0), "augment": Noise()},
    "everything": {"smoothing": Smoothing(2.0, (0.5, 0.7), 0.5), "sharpness": GSAM(0.1, 0.4), **ALL},
}
CASES = [
    pytest.param(options, engine, id=f"{name}, {engine}")
    for (name, options), engine in itertools.product(OPTIONS.items(), ["student", "generic"])
    if engine == "generic" or "smoothing" not in options or not options["smoothing"].gradient_penalty
]


@pytest.mark.parametrize(("options", "engine"), CASES)
def test_students_are_those_of_the_literal_loop(options, engine):
    net, theta0, images, labels = problem()
    options = {"epochs": 3, "batch_size": 4, **options}
    lr = torch.tensor([0.05, 0.1, 0.02], dtype=torch.float64)
    found = pydistill.train_students(
        net, theta0, images, labels, lr=lr, generator=generators(), engine=engine, **options
    )
    without = {k: v for k, v in options.items() if k not in ("sharpness", "smoothing")}
    plain = pydistill.train_students(
        net, theta0, images, labels, lr=lr, generator=generators(), engine=engine, **without
    )
    for e, generator in enumerate(generators()):
        theta, losses, _ = literal_loop(net, theta0[e], images, labels, lr=lr[e].item(), generator=generator, **options)
        moved = theta - theta0[e]
        assert (found.theta[e] - theta).norm() < 1e-9 * moved.norm()
        assert (plain.theta[e] - theta).norm() > 1e-3 * moved.norm()  # the option has an effect
        torch.testing.assert_close(found.losses[:, e], losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_students_at_once_are_those_one_by_one(engine):
    net, theta0, images, labels = problem()
    options = {"epochs": 2, "batch_size": 4, "lr": 0.05, "engine": engine, "train_accuracy": True}
    options |= {"sharpness": GSAM(0.1, 0.4), "smoothing": Smoothing(loss_decay=(0.5,), clip_norm=0.5)}
    together = pydistill.train_students(net, theta0, images, labels, generator=generators(), **options)
    for e, generator in enumerate(generators()):
        alone = pydistill.train_students(net, theta0[e : e + 1], images, labels, generator=generator, **options)
        torch.testing.assert_close(together.theta[e], alone.theta[0], rtol=1e-10, atol=1e-12)
        assert torch.equal(together.train_accuracy[:, e], alone.train_accuracy[:, 0])


def test_buffers_change_once_a_step():
    net, theta0, images, labels = problem(WithBatchNorm())
    options = {"epochs": 2, "batch_size": 4, "lr": 0.05}
    options |= {"sharpness": GSAM(0.1, 0.4), "smoothing": Smoothing(2.0)}
    found = pydistill.train_students(net, theta0, images, labels, generator=generators(), **options)
    assert found.buffers["norm.num_batches_tracked"].tolist() == [6] * E
    for e, generator in enumerate(generators()):
        theta, _, trained = literal_loop(net, theta0[e], images, labels, generator=generator, **options)
        torch.testing.assert_close(found.theta[e], theta, rtol=1e-8, atol=1e-10)
        for name, buffer in trained.named_buffers():
            torch.testing.assert_close(found.buffers[name][e], buffer)


def test_random_nets_draw_in_every_pass():
    net, theta0, images, labels = problem(WithBatchNorm(0.5))
    options = {"epochs": 2, "batch_size": 4, "lr": 0.05}
    options |= {"sharpness": GSAM(0.1, 0.4), "smoothing": Smoothing(2.0)}
    torch.manual_seed(3)
    found = pydistill.train_students(net, theta0, images, labels, generator=generators(), **options)
    torch.manual_seed(3)
    for e, generator in enumerate(generators()):
        theta, _, _ = literal_loop(net, theta0[e], images, labels, generator=generator, **options)
        torch.testing.assert_close(found.theta[e], theta, rtol=1e-8, atol=1e-10)


def test_a_penalty_that_no_parameter_changes_changes_nothing():
    """Logits that are linear in images and parameters."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(K))

        def forward(self, x):
            return self.bias + 0 * x.sum((1, 2, 3))[:, None]

    net, theta0, images, labels = problem(Bias())
    options = {"epochs": 2, "batch_size": 4, "lr": 0.05}
    found = pydistill.train_students(
        net, theta0, images, labels, smoothing=Smoothing(2.0), generator=generators(), **options
    )
    plain = pydistill.train_students(net, theta0, images, labels, generator=generators(), **options)
    assert torch.equal(found.theta, plain.theta)


def test_auto_takes_the_engine_that_has_the_penalty(caplog):
    net, theta0, images, labels = problem()
    options = {"epochs": 1, "lr": 0.05}
    with caplog.at_level("DEBUG", logger="pydistill"):
        pydistill.train_students(net, theta0, images, labels, smoothing=Smoothing(2.0), **options)
        pydistill.train_students(net, theta0, images, labels, smoothing=Smoothing(clip_norm=1.0), **options)
    assert [record.message.partition(" engine")[0] for record in caplog.records] == ["generic", "student"]
    with pytest.raises(ValueError, match=r"engine: .* but smoothing's gradient_penalty is differentiated twice"):
        pydistill.train_students(net, theta0, images, labels, smoothing=Smoothing(2.0), engine="student", **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GSAM(0.0), ValueError, "rho: expected a positive number, got 0"),
        (lambda: GSAM(-1.0), ValueError, r"rho: expected a finite number >= 0, got -1\.0"),
        (lambda: GSAM("1"), TypeError, "rho: expected a number, got str"),
        (lambda: GSAM(1.0, float("nan")), ValueError, "alpha: expected a finite number >= 0, got nan"),
        (lambda: Smoothing(-2.0), ValueError, r"gradient_penalty: expected a finite number >= 0, got -2\.0"),
        (lambda: Smoothing(loss_decay=0.5), TypeError, "loss_decay: expected a sequence of numbers, got float"),
        (
            lambda: Smoothing(loss_decay=(0.5, -1)),
            ValueError,
            r"loss_decay\[1\]: expected a finite number >= 0, got -1",
        ),
        (lambda: Smoothing(clip_norm=0.0), ValueError, "clip_norm: expected a positive number, got 0"),
        (lambda: train(sharpness=0.1), TypeError, "sharpness: expected a GSAM or None, got float"),
        (lambda: train(smoothing=GSAM(1.0)), TypeError, "smoothing: expected a Smoothing or None, got GSAM"),
    ],
)
def test_wrong_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def train(**options):
    return pydistill.train_students(*problem(), epochs=1, lr=0.1, **options)
