"""The exact gradient equals autograd's through all steps; the unroll's options, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import pydistill
from pydistill.trajectory import FlatModule
from tests.matrices import sample


def problem(dtype=torch.float64, label_kind="logits", N=12, size=8, net=None):
    """A small student, start, target, images, labels and learning rate."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = net or pydistill.nn.ConvNet(3, 5, width=6, depth=2, image_size=size)
    net = net.to(dtype)
    theta0 = FlatModule(net).parameters()

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = [theta0 + 0.1 * randn(len(theta0)) for _ in range(3)]
    images = randn(N, 3, size, size)
    if label_kind == "hard":
        labels = torch.arange(N) % 5
    else:
        labels = randn(N, 5)
        labels = labels.softmax(1) if label_kind == "probs" else labels
    return net, theta0, targets, images, labels, torch.tensor(0.05, dtype=dtype)


def gradients(mode, *, targets_at=(), label_kind="logits", dtype=torch.float64, net=None, **options):
    """loss and its gradients with respect to theta0, images, labels (when floating) and lr."""
    net, theta0, targets, images, labels, lr = problem(dtype, label_kind, net=net)
    leaves = [t.clone().requires_grad_() for t in (theta0, images, labels, lr) if t.is_floating_point()]
    at = iter(leaves)
    theta0, images = next(at), next(at)
    labels = next(at) if label_kind != "hard" else labels
    loss = pydistill.trajectory_match(
        net,
        theta0,
        targets[0],
        images,
        labels,
        next(at),
        targets=dict(zip(targets_at, targets[1:], strict=False)),
        label_kind=label_kind,
        mode=mode,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves)]


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


OPTIONS = [
    {},
    {"batch_size": 5},
    {"batch_size": 5, "momentum": 0.9},
    {"batch_size": 5, "momentum": 0.9, "weight_decay": 5e-3, "targets_at": (3, 7)},
    {"label_kind": "probs", "loss_scale": 0.3},
    {"label_kind": "hard", "batch_size": 12},
    {"batch_size": 5, "momentum": 0.9, "weight_decay": 5e-3, "targets_at": (3, 7), "store_every": 4},
    {"batch_size": 5, "store": "host", "store_every": 3},
    {"batches": [torch.tensor([0, 1, 1]), *[torch.tensor([k, 11]) for k in range(9)]]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(k for k in o) or "default")
def test_exact_equals_full(options):
    full_options = {k: v for k, v in options.items() if not k.startswith("store")}
    truth = gradients("full", steps=10, **full_options)
    actual = gradients("exact", steps=10, **options)
    for name, a, t in zip(("loss", "theta0", "images", "labels or lr", "lr"), actual, truth, strict=False):
        assert t.norm() > 0, name
        assert relative(a, t) < 1e-10, name


@pytest.mark.parametrize("options", OPTIONS[:6], ids=lambda o: " ".join(k for k in o) or "default")
def test_one_step_is_exact_to_rounding(options):
    """At fixed theta, each step of the sweep is autograd's own: 1e-12."""
    options = {**options, "targets_at": ()}
    for a, t in zip(gradients("exact", steps=1, **options), gradients("full", steps=1, **options), strict=True):
        assert relative(a, t) < 1e-12


def test_fp32_stays_within_the_noise_floor():
    """fp32 trajectories amplify rounding: exact may differ from float64 as much as autograd in fp32 does."""
    options = {"steps": 10, "batch_size": 5, "momentum": 0.9, "weight_decay": 5e-4}
    truth = gradients("full", **options)
    noise = gradients("full", dtype=torch.float32, **options)
    actual = gradients("exact", dtype=torch.float32, **options)
    for a, n, t in zip(actual, noise, truth, strict=True):
        assert relative(a.double(), t) <= 3 * relative(n.double(), t) + 1e-6


def test_first_order_is_teslas_estimator():
    """Its formula written out: every theta_k constant; equal to the exact gradient for one step, biased beyond."""
    net, theta0, targets, images, labels, lr = problem(label_kind="hard")
    flat = FlatModule(net)
    T = 4
    X = images.clone().requires_grad_()
    theta, thetas, grads = theta0, [], []
    for _ in range(T):
        leaf = theta.clone().requires_grad_()
        loss = nn.functional.cross_entropy(flat(leaf, images), labels)
        thetas.append(theta)
        grads.append(torch.autograd.grad(loss, leaf)[0])
        theta = theta - lr * grads[-1]
    outer = 2 * (theta - targets[0]) / (theta0 - targets[0]).square().sum()
    expected = torch.zeros_like(images)
    for k in range(T):
        leaf = thetas[k].clone().requires_grad_()
        loss = nn.functional.cross_entropy(flat(leaf, X), labels)
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        expected += torch.autograd.grad(g, X, -lr * outer)[0]
    _, _, d_images, d_lr = gradients("first_order", steps=T, label_kind="hard")
    torch.testing.assert_close(d_images, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(d_lr, -(sum(grads) @ outer), rtol=1e-10, atol=1e-12)
    exact = gradients("exact", steps=T, label_kind="hard")[2]
    assert relative(d_images, exact) > 1e-3
    one = [gradients(mode, steps=1, label_kind="hard")[2] for mode in ("first_order", "exact")]
    torch.testing.assert_close(*one, rtol=1e-12, atol=1e-14)


def test_at_returns_parameters_after_those_steps():
    net, theta0, _, images, labels, lr = problem()
    options = {"label_kind": "logits", "steps": 6}
    four, six = pydistill.unroll(net, theta0, images, labels, lr, at=(4, 6), **options)
    assert torch.equal(six, pydistill.unroll(net, theta0, images, labels, lr, **options))
    assert torch.equal(four, pydistill.unroll(net, theta0, images, labels, lr, **{**options, "steps": 4}))


def test_any_outer_loss():
    net, theta0, _, images, labels, lr = problem()
    found = []
    for mode in ("full", "exact"):
        X = images.clone().requires_grad_()
        theta = pydistill.unroll(net, theta0, X, labels, lr, steps=5, label_kind="logits", mode=mode)
        logits = FlatModule(net)(theta, images.flip(0))
        (logits.square().sum() + theta[::3].sin().sum()).backward()
        found.append(X.grad)
    assert relative(found[1], found[0]) < 1e-10


class Flip:
    """Flips and scales with parameters of its own."""

    def __init__(self):
        self.seen = []

    def draw(self, shape, generator):
        return torch.rand((shape[0], 2), generator=generator)

    def __call__(self, images, record):
        self.seen.append(record)
        flipped = torch.where((record[:, :1] < 0.5)[..., None, None], images.flip(3), images)
        return flipped * (record[:, 1] + 0.5).to(images.dtype).view(-1, 1, 1, 1)


@pytest.mark.parametrize("options", [{}, {"store_every": 3}])
def test_recorded_augmentation_is_replayed(options):
    augment = Flip()
    truth = gradients("full", steps=6, batch_size=5, augment=Flip())
    actual = gradients("exact", steps=6, batch_size=5, augment=augment, **options)
    assert all(relative(a, t) < 1e-10 for a, t in zip(actual, truth, strict=True))
    forward, backward = augment.seen[:6], augment.seen[6:]
    assert len({id(r) for r in forward}) == 6
    assert {id(r) for r in backward} == {id(r) for r in forward}


class WithDropout(nn.Module):
    """A student with randomness, running statistics and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 5)

    def forward(self, x):
        features = self.drop(self.norm(self.conv(x)).sigmoid().mean((2, 3)))
        return features, self.head(features)


@pytest.mark.parametrize("options", [{}, {"store_every": 2}])
def test_global_randomness_is_replayed_and_buffers_change_once(options):
    """Dropout, an augmentation by a plain function, and BatchNorm's statistics."""

    def noisy(x):
        return x + 0.1 * torch.randn_like(x)

    found, buffers, states = [], [], []
    for mode in ("full", "exact"):
        torch.manual_seed(0)
        net = WithDropout()
        more = options if mode == "exact" else {}
        found.append(gradients(mode, steps=5, batch_size=5, net=net, output=1, augment=noisy, **more))
        buffers.append([b.clone() for b in net.buffers()])
        states.append(torch.get_rng_state())
    assert all(relative(a, t) < 1e-10 for a, t in zip(found[1], found[0], strict=True))
    for exact, full in zip(buffers[1], buffers[0], strict=True):
        torch.testing.assert_close(exact, full, rtol=1e-12, atol=0)
    assert torch.equal(*states)


def test_batches_use_up_each_permutation():
    from pydistill.trajectory.inner_loop import _draw_batches

    batches = _draw_batches(5, 6, 12, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [5, 5, 2, 5, 5, 2]
    for half in (batches[:3], batches[3:]):
        assert sorted(torch.cat(half).tolist()) == list(range(12))
    assert not torch.equal(batches[0], batches[3])


def test_reparam_module_and_net_give_the_same():
    net, theta0, _, images, labels, lr = problem()
    wrapped = pydistill.compat.ReparamModule(net)
    assert torch.equal(wrapped.flat_param.detach(), theta0)
    for flat_param in (theta0, theta0[None]):  # weights at other addresses: torch's products may have other bits
        torch.testing.assert_close(wrapped(images, flat_param=flat_param), net(images), rtol=1e-12, atol=1e-12)
    options = {"steps": 3, "label_kind": "logits"}
    expected = pydistill.unroll(net, theta0, images, labels, lr, **options)
    assert torch.equal(pydistill.unroll(wrapped, theta0, images, labels, lr, **options), expected)


def test_reparam_module_takes_its_network_along():
    wrapped = pydistill.compat.ReparamModule(WithDropout()).double().eval()
    assert {b.dtype for b in wrapped.module.buffers() if b.is_floating_point()} == {torch.float64}
    assert not wrapped.module.training
    assert wrapped(torch.randn(2, 3, 8, 8, dtype=torch.float64))[1].dtype == torch.float64


def test_theta0_of_a_wrong_kind_is_named_by_the_match():
    net, theta0, _, images, labels, lr = problem()
    with pytest.raises(TypeError, match="theta0: expected a tensor, got str"):
        pydistill.trajectory_match(net, "theta", theta0, images, labels, lr, steps=2)
    for wrong in (theta0[..., :-1], theta0[None, None]):
        with pytest.raises(ValueError, match=r"theta0: expected shape \[\d+\] or \[E, \d+\] for this net"):
            pydistill.trajectory_match(net, wrong, theta0, images, labels, lr, steps=2)


def test_a_repos_loop_over_the_wrapper():
    """``student(x, flat_param=theta)`` with ``create_graph=True``, as in trajectory repositories."""
    net, theta0, targets, images, labels, lr = problem(label_kind="hard")
    student = pydistill.compat.ReparamModule(net)
    X = images.clone().requires_grad_()
    thetas = [theta0.clone().requires_grad_()]
    for _ in range(3):
        loss = nn.functional.cross_entropy(student(X, flat_param=thetas[-1]), labels)
        (grad,) = torch.autograd.grad(loss, thetas[-1], create_graph=True)
        thetas.append(thetas[-1] - lr * grad)
    loss = (thetas[-1] - targets[0]).square().sum() / (theta0 - targets[0]).square().sum()
    loss.backward()
    assert relative(gradients("exact", steps=3, label_kind="hard")[2], X.grad) < 1e-10


def test_divergence_names_the_step():
    net, theta0, _, images, labels, _ = problem(torch.float32)
    with pytest.raises(FloatingPointError, match=r"non-finite in step 2 of 5"):
        pydistill.unroll(net, theta0, images * 1e4, labels, 1e38, steps=5, label_kind="logits")
    theta = pydistill.unroll(net, theta0, images * 1e4, labels, 1e38, steps=5, label_kind="logits", check_finite=False)
    assert theta.isnan().any()


def test_the_gradient_is_not_differentiated_again():
    net, theta0, _, images, labels, lr = problem()
    X = images.clone().requires_grad_()
    theta = pydistill.unroll(net, theta0, X, labels, lr, steps=2, label_kind="logits")
    with pytest.raises(RuntimeError, match="cannot be differentiated again; mode='full' can"):
        torch.autograd.grad(theta.square().sum(), X, create_graph=True)


def test_changes_between_the_passes_are_noticed():
    net, theta0, _, images, labels, lr = problem()
    X = images.clone().requires_grad_()
    options = {"steps": 2, "label_kind": "logits"}
    theta = pydistill.unroll(net, theta0, X, labels, lr, **options)
    net.eval()
    with pytest.raises(RuntimeError, match="training mode changed"):
        theta.sum().backward()
    net.train()
    theta = pydistill.unroll(net, theta0, X, labels, lr, engine="generic", **options)
    handle = net.classifier.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(RuntimeError, match="modules, hooks or a forward changed"):
        theta.sum().backward()
    handle.remove()
    theta = pydistill.unroll(net, theta0, X, labels, lr, **options)
    with torch.no_grad():
        X += 1
    with pytest.raises(RuntimeError, match="images, labels, lr: one of them was changed in place"):
        theta.sum().backward()


def test_plain_floats_and_no_gradients():
    net, theta0, _, images, labels, _ = problem()
    theta = pydistill.unroll(net, theta0, images, labels, 0.05, steps=2, label_kind="logits")
    assert not theta.requires_grad


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        return x, self.head(x.flatten(1))


BAD = [
    ({"theta0": lambda p: p["theta0"][:-1]}, ValueError, r"theta0: expected shape \[\d+\] or \[E, \d+\] for"),
    ({"theta0": lambda p: p["theta0"].long()}, TypeError, "theta0: expected a floating dtype, got torch.int64"),
    ({"images": lambda p: p["images"][0]}, ValueError, r"images: expected \[N, C, H, W\], got shape \[3, 8, 8\]"),
    ({"images": lambda p: p["images"].float()}, TypeError, "images: expected dtype torch.float64 as theta0"),
    ({"images": lambda p: p["images"].to("meta")}, ValueError, "images: expected device cpu as theta0, got meta"),
    ({"images": lambda p: p["images"][:0]}, ValueError, "images: expected at least one image, got an empty batch"),
    ({"images": lambda p: p["images"][..., :7]}, ValueError, r"images: expected \[N, 3, 8, 8\]"),
    ({"images": lambda p: "x"}, TypeError, "images: expected a tensor, got str"),
    ({"labels": lambda p: p["labels"][:-1]}, ValueError, r"labels: expected shape \[12, K\], got \[11, 5\]"),
    (
        {"labels": lambda p: torch.arange(12)},
        TypeError,
        "labels: expected dtype torch.float64 as theta0 for label_kind",
    ),
    ({"labels": lambda p: p["labels"][:, :4]}, ValueError, r"labels: expected \[N, 5\] for the net's classes"),
    ({"label_kind": "hard"}, TypeError, "labels: expected int64 class numbers for label_kind='hard'"),
    ({"label_kind": "hard", "labels": lambda p: torch.arange(12)}, ValueError, "below the net's 5 classes, got 11"),
    ({"label_kind": "hard", "labels": lambda p: torch.arange(12) - 1}, ValueError, "class numbers >= 0, got -1"),
    ({"label_kind": "soft"}, ValueError, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
    ({"lr": lambda p: torch.ones(2)}, ValueError, r"lr: expected one element, got shape \[2\]"),
    ({"lr": lambda p: "0.1"}, TypeError, "lr: expected a tensor of one element or a number, got str"),
    ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps: expected an int, got float"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an int of at least 1 or None, got 0"),
    ({"batches": [torch.tensor([0])]}, ValueError, "batches: expected 2 index tensors, one a step, got 1"),
    ({"batches": [torch.tensor([0]), torch.tensor([12])]}, ValueError, r"image numbers in 0..11, got 12"),
    ({"batches": [torch.tensor([0]), torch.tensor([], dtype=torch.int64)]}, ValueError, r"batches\[1\]: .* empty"),
    (
        {"batches": [torch.tensor([0]), torch.tensor([0.5])]},
        TypeError,
        r"batches\[1\]: expected an int64 tensor",
    ),
    ({"batches": [torch.tensor([0])] * 2, "batch_size": 1}, ValueError, "either batches or batch_size, got both"),
    ({"at": (3,)}, ValueError, r"at: expected step numbers in 1..2, got 3"),
    ({"mode": "tesla"}, ValueError, "mode: expected 'exact', 'first_order' or 'full', got 'tesla'"),
    ({"momentum": -1.0}, ValueError, "momentum: expected a finite number >= 0, got -1.0"),
    ({"momentum": torch.ones(2)}, TypeError, "momentum: expected a number, got Tensor"),
    ({"store": "disk"}, ValueError, "store: expected 'device' or 'host', got 'disk'"),
    ({"store_every": 0}, ValueError, "store_every: expected at least 1, got 0"),
    ({"augment": 3}, TypeError, "augment: expected a callable or None, got int"),
    ({"net": lambda p: "net"}, TypeError, "net: expected an nn.Module, got str"),
    ({"net": lambda p: nn.ReLU()}, ValueError, "net: it has no parameters"),
    (
        {"net": lambda p: Tuple().double(), "theta0": lambda p: torch.zeros(965, dtype=torch.float64)},
        TypeError,
        "net: its forward returned a tuple, expected a tensor of logits; output=i",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    net, theta0, _, images, labels, lr = problem()
    given = {"net": net, "theta0": theta0, "images": images, "labels": labels, "lr": lr, "steps": 2}
    given["label_kind"] = "logits"
    for name, value in change.items():
        given[name] = value(given) if callable(value) else value
    with pytest.raises(error, match=message):
        pydistill.unroll(
            given.pop("net"), given.pop("theta0"), given.pop("images"), given.pop("labels"), given.pop("lr"), **given
        )


@pytest.mark.parametrize(
    ("target", "more", "error", "message"),
    [
        (lambda t: t[:-1], {}, ValueError, r"target: expected torch.float64 \[\d+\] on cpu as theta0"),
        (lambda t: None, {}, TypeError, "target: expected a tensor, got NoneType"),
        (lambda t: t, {}, ValueError, "target: it equals theta0"),
        (lambda t: t + 1, {"targets": {1: torch.zeros(3)}}, ValueError, r"targets\[1\]: expected torch.float64"),
        (
            lambda t: t + 1,
            {"targets": {9: torch.zeros(3)}},
            ValueError,
            r"targets: expected step numbers in 1..2, got 9",
        ),
        (lambda t: t + 1, {"at": (1,)}, TypeError, "trajectory_match takes targets="),
    ],
)
def test_bad_targets(target, more, error, message):
    net, theta0, _, images, labels, lr = problem()
    with pytest.raises(error, match=message):
        pydistill.trajectory_match(
            net, theta0, target(theta0), images, labels, lr, steps=2, label_kind="logits", **more
        )


MEMORY_SCRIPT = """
import resource, sys, torch, pydistill
from pydistill.trajectory import Adam, FlatModule
optimizer = Adam() if sys.argv[2] == "adam" else "sgd"
torch.manual_seed(0)
net = pydistill.nn.ConvNet(3, 10, width=128, depth=3, image_size=16)
theta0 = FlatModule(net).parameters()
target = theta0 + 0.01 * torch.randn_like(theta0)
X = torch.randn(10, 3, 16, 16, requires_grad=True)
for _ in range(2):
    options = {"steps": int(sys.argv[1]), "optimizer": optimizer}
    pydistill.trajectory_match(net, theta0, target, X, torch.arange(10), 0.001, **options).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(theta0))
"""


@pytest.mark.parametrize(("optimizer", "vectors"), sample([("sgd", 1), ("adam", 3)], [("sgd", 1)]))
def test_memory_grows_by_its_vectors_a_step(optimizer, vectors):
    """Peak of T = 270 minus peak of T = 230: at most 1.2 times the 40 steps' vectors; and flat over outer steps.

    Up to 211 steps of this size, "auto" has room to keep activations.
    """
    peaks = []
    for steps in (230, 270):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, str(steps), optimizer],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        peak, P = map(int, result.stdout.split())
        peaks.append(peak)
    assert peaks[1] - peaks[0] <= 1.2 * 40 * vectors * P * 4
