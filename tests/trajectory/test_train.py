"""Students trained at once equal those that a plain loop of torch.optim.SGD trains one after the other."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.train import DivergedError
from tests.trajectory.students import E, K, N, Noise, WithBatchNorm, generators

M = 13


def convnet():
    return ConvNet(2, K, width=5, depth=2, image_size=8)


def problem(dtype=torch.float64, label_kind="hard", own=(), net=None):
    """net, theta0 [E, P], images, labels; ``own``: which of images and labels are per student."""
    torch.manual_seed(0)
    net = (net or convnet()).to(dtype)
    start = FlatModule(net).parameters()
    theta0 = start + 0.1 * torch.randn(E, len(start), dtype=torch.float64).to(dtype)
    images = torch.randn(*([E] if "images" in own else []), N, 2, 8, 8, dtype=torch.float64).to(dtype)
    shape = (*([E] if "labels" in own else []), N)
    labels = torch.randint(K, shape)
    if label_kind != "hard":
        labels = torch.randn(*shape, K, dtype=torch.float64).to(dtype)
    return net, theta0, images, labels.softmax(-1) if label_kind == "probs" else labels


def factor_of(schedule, epoch, epochs):
    if schedule == "cosine":
        return math.cos(math.pi * epoch / epochs) / 2 + 0.5
    return schedule(epoch, epochs) if callable(schedule) else 1.0


def plain_loop(net, theta, images, labels, *, epochs, lr, batch_size, generator, **options):
    """A student trained as in the papers' code; its parameters, mean losses, and the network itself."""
    net = copy.deepcopy(net).train()
    vector_to_parameters(theta.clone(), net.parameters())
    schedule, augment = options.get("schedule"), options.get("augment")
    targets = labels.softmax(-1) if options.get("label_kind") == "logits" else labels
    sgd = {"momentum": options.get("momentum", 0.0), "weight_decay": options.get("weight_decay", 0.0)}
    losses = []
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, **sgd)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * factor_of(schedule, epoch, epochs)
        if schedule == "step" and epoch >= (epochs + 1) // 2:
            if epoch == (epochs + 1) // 2:
                optimizer = torch.optim.SGD(net.parameters(), lr=lr / 10, **sgd)
            optimizer.param_groups[0]["lr"] = lr / 10
        total = 0.0
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            x = images[index]
            if hasattr(augment, "draw"):
                x = augment(x, augment.draw(x.shape, generator))
            elif augment is not None:
                x = augment(x)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), targets[index])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        losses.append(total / len(images))
    return parameters_to_vector(net.parameters()).detach(), torch.tensor(losses, dtype=torch.float64), net


def relative(actual, truth):
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


OPTIONS = {
    "plain": {},
    "whole batches": {"batch_size": 256},
    "batches that fit": {"batch_size": N},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.05},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.05},
    "step": {"schedule": "step", "momentum": 0.9, "weight_decay": 5e-4},
    "step, even": {"schedule": "step", "momentum": 0.9, "epochs": 4},
    "step, one epoch": {"schedule": "step", "epochs": 1},
    "cosine": {"schedule": "cosine", "momentum": 0.5},
    "function": {"schedule": lambda epoch, epochs: 1 / (1 + epoch + epochs)},
    "logits": {"label_kind": "logits"},
    "probs": {"label_kind": "probs", "own": ("labels",)},
    "own images": {"own": ("images",)},
    "own labels": {"own": ("labels",)},
    "all own": {"own": ("images", "labels"), "momentum": 0.9},
    "augment": {"augment": Noise()},
    "augment with all": {"augment": Noise(), "own": ("images", "labels"), "schedule": "step", "momentum": 0.9},
    "deterministic function": {"augment": lambda x: x.flip(-1)},
}


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_students_are_those_of_the_plain_loop(options, engine):
    options = {"epochs": 5, "batch_size": 4, **options}
    own, label_kind = options.pop("own", ()), options.get("label_kind", "hard")
    net, theta0, images, labels = problem(label_kind=label_kind, own=own)
    lr = torch.tensor([0.05, 0.1, 0.02], dtype=torch.float64)
    before = theta0.clone()
    found = pydistill.train_students(
        net, theta0, images, labels, lr=lr, generator=generators(), engine=engine, **options
    )
    assert torch.equal(theta0, before)
    assert found.theta.shape == theta0.shape
    for e, generator in enumerate(generators()):
        x = images[e] if images.dim() == 5 else images
        y = labels[e] if "labels" in own else labels
        theta, losses, _ = plain_loop(net, theta0[e], x, y, lr=lr[e].item(), generator=generator, **options)
        assert relative(found.theta[e] - theta0[e], theta - theta0[e]) < 1e-10
        torch.testing.assert_close(found.losses[:, e], losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_a_velocity_continues_the_training_before(engine):
    net, theta0, images, labels = problem()
    options = {"batch_size": 4, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "engine": engine}
    whole = pydistill.train_students(net, theta0, images, labels, epochs=3, generator=generators(), **options)
    sources = generators()
    found = pydistill.train_students(net, theta0, images, labels, epochs=1, generator=sources, **options)
    given = found.velocity.clone()
    theta, velocity = found.theta, found.velocity
    found = pydistill.train_students(
        net, theta, images, labels, epochs=2, generator=sources, velocity0=velocity, **options
    )
    assert torch.equal(found.theta, whole.theta)
    assert torch.equal(found.velocity, whole.velocity)
    assert torch.equal(velocity, given)
    assert whole.velocity.norm() > 0
    plain = {**options, "momentum": 0.0}
    assert pydistill.train_students(net, theta0, images, labels, epochs=1, **plain).velocity is None


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_float32_stays_close_for_a_few_steps(engine):
    net, theta0, images, labels = problem(torch.float32)
    options = {"epochs": 2, "batch_size": 6, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "step"}
    found = pydistill.train_students(net, theta0, images, labels, generator=generators(), engine=engine, **options)
    for e, generator in enumerate(generators()):
        theta, losses, _ = plain_loop(net, theta0[e], images, labels, generator=generator, **options)
        assert relative(found.theta[e] - theta0[e], theta - theta0[e]) < 1e-4
        torch.testing.assert_close(found.losses[:, e].double(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bfloat16_convolutions_train_about_the_same_student(precision):
    net, theta0, images, labels = problem(torch.float32)
    options = {"epochs": 2, "batch_size": 6, "lr": 0.05, "generator": generators()}
    theta = pydistill.train_students(net, theta0, images, labels, precision=precision, **options).theta
    truth = pydistill.train_students(net, theta0, images, labels, **{**options, "generator": generators()}).theta
    error = relative(theta - theta0, truth - theta0)
    assert error == 0 if precision == "fp32" else 1e-4 < error < 0.1


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("default", [False, True])
def test_one_generator_gives_what_calls_one_after_the_other_get(engine, default):
    net, theta0, images, labels = problem()
    options = {"epochs": 2, "batch_size": 4, "lr": 0.05, "augment": Noise(), "engine": engine}
    source = torch.default_generator if default else torch.Generator()
    options["generator"] = None if default else source
    source.manual_seed(5)
    at_once = pydistill.train_students(net, theta0, images, labels, **options)
    after = source.get_state()
    source.manual_seed(5)
    for e in range(E):
        alone = pydistill.train_students(net, theta0[e : e + 1], images, labels, **options)
        assert relative(at_once.theta[e] - theta0[e], alone.theta[0] - theta0[e]) < 1e-10
        torch.testing.assert_close(at_once.losses[:, e], alone.losses[:, 0], rtol=1e-10, atol=1e-12)
    assert torch.equal(source.get_state(), after)


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("size", [M, 1203])
def test_accuracies_are_counted_over_all_images(engine, size):
    net, theta0, images, labels = problem()
    eval_data = torch.randn(size, 2, 8, 8, dtype=torch.float64), torch.randint(K, (size,))
    options = {"epochs": 3, "batch_size": 4, "lr": 0.05, "augment": Noise(), "engine": engine}
    found = pydistill.train_students(
        net, theta0, images, labels, generator=generators(), eval_data=eval_data, train_accuracy=True, **options
    )
    del options["engine"]
    flat = FlatModule(net)
    for e, generator in enumerate(generators()):
        theta, _, _ = plain_loop(net, theta0[e], images, labels, generator=generator, **options)
        right = flat(theta, eval_data[0]).argmax(1) == eval_data[1]
        assert found.accuracy[e].item() == right.sum().item() / size
    assert found.accuracy.dtype == found.train_accuracy.dtype == torch.float64

    still = pydistill.train_students(net, theta0, images, labels, epochs=2, lr=1e-300, train_accuracy=True)
    for e in range(E):
        right = (flat(theta0[e], images).argmax(1) == labels).sum().item()
        assert still.train_accuracy[:, e].tolist() == [right / N] * 2
    assert still.accuracy is None
    soft = pydistill.train_students(
        net, theta0, images, F.one_hot(labels, K).double(), label_kind="probs", epochs=2, lr=1e-300, train_accuracy=True
    )
    assert torch.equal(soft.train_accuracy, still.train_accuracy)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_other_networks_have_buffers_and_draws_of_their_own(dropout):
    """Dropout draws from the global generator, in the order of students that train one after the other."""
    net, theta0, images, labels = problem(net=WithBatchNorm(dropout))
    net.norm.running_mean += 1
    net.eval()
    net.norm.train()
    before = copy.deepcopy(net.state_dict())
    eval_data = torch.randn(M, 2, 8, 8, dtype=torch.float64), torch.randint(K, (M,))
    options = {"epochs": 3, "batch_size": 4, "lr": 0.05, "momentum": 0.9}
    torch.manual_seed(3)
    found = pydistill.train_students(
        net, theta0, images, labels, generator=generators(), eval_data=eval_data, **options
    )
    torch.manual_seed(3)
    for e, generator in enumerate(generators()):
        theta, _, trained = plain_loop(net, theta0[e], images, labels, generator=generator, **options)
        assert relative(found.theta[e] - theta0[e], theta - theta0[e]) < 1e-10
        for name, buffer in trained.named_buffers():
            torch.testing.assert_close(found.buffers[name][e], buffer)
        right = trained.eval()(eval_data[0]).argmax(1) == eval_data[1]
        assert found.accuracy[e].item() == right.sum().item() / M
        other = copy.deepcopy(net)
        found.copy_into(other, e)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, trained.state_dict()[name])
    assert found.buffers["norm.num_batches_tracked"].tolist() == [9] * E
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == [False, False, True, False, False]


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_callbacks_count_students_and_see_their_epochs(engine):
    net, theta0, images, labels = problem()
    steps, records = [], []
    eval_data = torch.randn(501, 2, 8, 8, dtype=torch.float64), torch.zeros(501, dtype=torch.int64)
    options = {"batch_size": 4, "lr": 0.05, "engine": engine}

    def on_epoch(record):
        records.append({**record, "theta": record["theta"].clone()})

    found = pydistill.train_students(
        *(net, theta0, images, labels),
        **options,
        epochs=2,
        generator=generators(),
        train_accuracy=True,
        eval_data=eval_data,
        on_step=lambda: steps.append(None),
        on_epoch=on_epoch,
    )
    assert len(steps) == E * (2 * 3 + 2)
    together = [range(E)] if engine == "student" else [range(e, e + 1) for e in range(E)]
    assert [(r["students"], r["epoch"]) for r in records] == [(rows, epoch) for rows in together for epoch in (1, 2)]
    for record in records:
        rows, epoch = list(record["students"]), record["epoch"]
        torch.testing.assert_close(record["losses"], found.losses[epoch - 1, rows])
        assert torch.equal(record["train_accuracy"], found.train_accuracy[epoch - 1, rows])
        one = pydistill.train_students(
            net, theta0, images, labels, **options, epochs=epoch, generator=generators()
        ).theta
        assert torch.equal(record["theta"], one[rows])

    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        pydistill.train_students(net, theta0, images, labels, **options, epochs=2, on_step=stop)


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_students_that_diverge_are_named(engine):
    net, theta0, images, labels = problem()
    options = {"epochs": 2, "batch_size": 4, "engine": engine}
    lr = torch.tensor([0.01, 1e308, 0.01], dtype=torch.float64)
    with pytest.raises(DivergedError, match=r"the loss of student 1 is nan in epoch 1, step [23]: ") as raised:
        pydistill.train_students(net, theta0, images, labels, lr=lr, **options)
    assert (raised.value.student, raised.value.epoch) == (1, 1)
    with pytest.raises(FloatingPointError, match="the parameters of student 1 are no longer finite in epoch 1, step 1"):
        pydistill.train_students(
            net, theta0, images, labels, lr=lr, weight_decay=1e3, epochs=1, batch_size=N, engine=engine
        )
    found = pydistill.train_students(
        net, theta0, images, labels, lr=lr, check_finite=False, generator=generators(), **options
    )
    assert found.theta.isfinite().all(1).tolist() == [True, False, True]


def test_auto_takes_the_student_engine_for_convnets_alone(caplog):
    net, theta0, images, labels = problem()
    with caplog.at_level("DEBUG", logger="pydistill"):
        pydistill.train_students(net, theta0, images, labels, lr=0.1, epochs=1)
        net, theta0, images, labels = problem(net=WithBatchNorm())
        pydistill.train_students(net, theta0, images, labels, lr=0.1, epochs=1)
    assert [record.message.partition(" engine")[0] for record in caplog.records] == ["student", "generic"]


WRONG = [
    ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
    ({"velocity0": 0.0}, TypeError, "velocity0: expected a tensor or None, got float"),
    ({"velocity0": torch.zeros(E, 3)}, ValueError, "velocity0: expected None without momentum"),
    (
        {"velocity0": torch.zeros(E, 3), "momentum": 0.9},
        ValueError,
        r"velocity0: expected torch\.float64 \[3, \d+\] on cpu as theta0, got torch\.float32 \[3, 3\] on cpu",
    ),
    ({"epochs": 1.0}, TypeError, "epochs: expected a whole number, got 1.0"),
    ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
    ({"batch_size": None}, TypeError, "batch_size: expected a whole number, got None"),
    ({"lr": 0.0}, ValueError, r"lr: expected a positive finite number, got 0\.0"),
    ({"lr": float("nan")}, ValueError, "lr: expected a positive finite number, got nan"),
    ({"lr": torch.tensor([0.1, -0.1, 0.1])}, ValueError, r"lr: expected a positive finite number, got \[0\.1"),
    ({"lr": torch.ones(2)}, ValueError, r"lr: expected one element or \[3\], got shape \[2\]"),
    ({"lr": "0.1"}, TypeError, "lr: expected a tensor of one element or a number, got str"),
    ({"momentum": -0.1}, ValueError, r"momentum: expected a finite number >= 0, got -0\.1"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay: expected a finite number >= 0, got nan"),
    ({"weight_decay": "a"}, TypeError, "weight_decay: expected a number, got str"),
    ({"schedule": "linear"}, ValueError, "schedule: expected None, 'step', 'cosine' or a function, got 'linear'"),
    ({"schedule": lambda epoch, epochs: -1}, ValueError, r"schedule: .* >= 0, got -1\.0 for epoch 0"),
    ({"label_kind": "soft"}, ValueError, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
    ({"augment": 3}, TypeError, "augment: expected a callable or None, got int"),
    ({"on_step": 3}, TypeError, "on_step: expected a callable or None, got int"),
    ({"on_epoch": 3}, TypeError, "on_epoch: expected a callable or None, got int"),
    ({"generator": 3}, TypeError, r"generator: expected a torch\.Generator, a sequence of them or None, got 3"),
    ({"generator": generators()[:2]}, ValueError, "generator: expected one for each of 3 students, got 2, of which 2"),
    ({"generator": generators()[:1] * 3}, ValueError, "generator: .* got 3, of which 1 distinct"),
    ({"engine": "fast"}, ValueError, "engine: expected 'auto', 'student', 'compiled' or 'generic', got 'fast'"),
    ({"precision": "bf16"}, TypeError, "precision: expected float32 images and parameters for 'bf16'"),
    ({"precision": "fp8"}, ValueError, "precision: expected 'auto', 'ieee', .* or 'tf32-matmul', got 'fp8'"),
    ({"eval_data": torch.ones(3)}, TypeError, "eval_data: expected a pair of images and labels, got Tensor"),
    ({"eval_data": (torch.ones(1), [0])}, TypeError, "eval_data: expected two tensors, got Tensor and list"),
    ({"eval_data": (torch.ones(2, 2, 8, 8), torch.zeros(2).long())}, TypeError, "eval_data: .*got torch.float32"),
    (
        {"eval_data": (torch.ones(2, 1, 8, 8).double(), torch.zeros(2).long())},
        ValueError,
        r"eval_data: expected images \[M, 2, 8, 8\] and labels \[M\], M >= 1, got \[2, 1, 8, 8\] and \[2\]",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_options_are_named(options, error, message):
    net, theta0, images, labels = problem()
    with pytest.raises(error, match=message):
        pydistill.train_students(net, theta0, images, labels, **{"lr": 0.1, "epochs": 1, **options})


@pytest.mark.parametrize("engine", ["auto", "generic"])
def test_wrong_data_is_named(engine):
    net, theta0, images, labels = problem()
    cases = [
        ((theta0[0], images, labels), ValueError, r"theta0: expected shape \[E, \d+\] for this net, got \[\d+\]"),
        (([0.0], images, labels), TypeError, "theta0: expected a tensor, got list"),
        (
            (theta0, images.long(), labels),
            TypeError,
            r"images: expected dtype torch\.float64 as theta0, got torch\.int",
        ),
        ((theta0, images[0], labels), ValueError, r"images: expected \[N, C, H, W\] or \[3, N, C, H, W\], got shape"),
        ((theta0, images, labels[:4]), ValueError, r"labels: expected shape \[11\] or \[3, 11\] as images, got \[4\]"),
        ((theta0, images, labels.double()), TypeError, "labels: expected int64 class numbers for label_kind='hard'"),
        ((theta0, images, labels + K), ValueError, "labels: expected class numbers below the net's 4 classes, got"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            pydistill.train_students(net, *arguments, lr=0.1, epochs=1, engine=engine)
    net, theta0, images, labels = problem(net=WithBatchNorm())
    with pytest.raises(ValueError, match="engine: expected a net that the student engine can run, but "):
        pydistill.train_students(net, theta0, images, labels, lr=0.1, epochs=1, engine="student")
