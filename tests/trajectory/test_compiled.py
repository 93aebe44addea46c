"""The compiled engine: a graph gives what autograd gives, to the second derivative; what it refuses; what it keeps."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.trajectory import FlatModule, compiled
from pydistill.trajectory.compiled import CompiledStudents
from pydistill.trajectory.step import Batch

aten = torch.ops.aten


class Net(nn.Module):
    """Two convolutions that Winograd's kernel takes, a skip, a max pool, ReLUs in place, and a ``view``."""

    def __init__(self, norm=lambda C: nn.GroupNorm(C, C), after=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3, padding=1), norm(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=1), norm(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(32 * 4 * 4, 4)
        self.after = after or nn.Identity()

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.conv3(F.relu(self.norm2(self.conv2(x))))
        y += x
        x = F.avg_pool2d(self.pool(y), 2)
        return self.after(self.head(x.view(x.size(0), -1)))


@pytest.fixture
def graphs(monkeypatch):
    """The traced graphs, run as they are: compiling them is not tested here, and takes long."""
    found = []

    def compile(graph, *, fullgraph, dynamic):
        assert fullgraph
        assert not dynamic
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "_steps", type(compiled._steps)())
    return found


def gradients(net, engine, size=16, dtype=torch.float64, students=1, kind="logits", **options):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    net = net.to(dtype)
    theta0 = (FlatModule(net).parameters() + 0.02 * randn(students, FlatModule(net).numel)).requires_grad_()
    images = randn(13, 3, size, size).requires_grad_()
    labels = torch.arange(13) % 4 if kind == "hard" else randn(13, 4).requires_grad_()
    lr = torch.tensor(0.05, dtype=dtype, requires_grad=True)
    options = {"steps": 3, "batch_size": 9, "generator": torch.Generator().manual_seed(1), **options}
    theta = pydistill.unroll(net, theta0, images, labels, lr, label_kind=kind, engine=engine, **options)
    leaves = [t for t in (theta0, images, labels, lr) if t.requires_grad]
    return [theta.detach(), *torch.autograd.grad((theta * randn(*theta.shape)).sum(), leaves)]


def relative(actual, truth):
    assert truth.norm() > 0
    return ((actual - truth).norm() / truth.norm()).item()


NORMS = {
    "instance": lambda C: nn.GroupNorm(C, C),
    "group": lambda C: nn.GroupNorm(4, C),
    "batch": nn.BatchNorm2d,
    "batch without statistics": lambda C: nn.BatchNorm2d(C, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d,
    "layer": lambda C: nn.LayerNorm([C, 16, 16]),
    "none": lambda C: nn.Identity(),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_exact_gradient_is_the_loops(norm, graphs):
    """Two batch sizes, two students, every gradient to 1e-10; running statistics as after the plain loop."""
    found, buffers = [], []
    for engine in ("compiled", "generic"):
        torch.manual_seed(0)
        net = Net(NORMS[norm])
        mode = "exact" if engine == "compiled" else "full"
        found.append(gradients(net, engine, students=2, momentum=0.9, mode=mode))
        buffers.append(list(net.buffers()))
    assert all(relative(a, b) < 1e-10 for a, b in zip(*found, strict=True))
    assert len(graphs) == 4  # gradient and adjoint, for 9 images and for 4
    for a, b in zip(*buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_convolutions_of_five_taps(graphs):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 48, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 4))
    found = [gradients(net, engine, batch_size=None) for engine in ("compiled", "generic")]
    assert all(relative(a, b) < 1e-10 for a, b in zip(*found, strict=True))
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.pydistill.conv2d_weight_grad.default) == 2
    assert targets.count(torch.ops.pydistill.frozen_conv2d.default) == 1 + 5


@pytest.mark.parametrize("options", [{"kind": "hard"}, {"mode": "first_order"}, {"kind": "probs", "loss_scale": 0.5}])
def test_other_labels_and_modes(options, graphs):
    net = Net()
    if options.get("kind") == "probs":
        options = {**options, "kind": "logits"}
    found = [gradients(net, engine, batch_size=None, **options) for engine in ("compiled", "generic")]
    assert all(relative(a, b) < 1e-10 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (lambda: pydistill.nn.ConvNet(3, 4, width=32, depth=2, image_size=16), 16),
        (
            lambda: pydistill.nn.ConvNet(3, 4, width=8, depth=2, image_size=8, norm="group", act="sigmoid", pool="max"),
            8,
        ),
        (lambda: pydistill.nn.ViT(3, 4, width=16, depth=1, image_size=8, heads=2), 8),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 4)), 8),
    ],
)
def test_our_networks_and_operators(net, size, graphs):
    torch.manual_seed(0)
    net = net()
    found = [gradients(net, engine, size, batch_size=None) for engine in ("compiled", "generic")]
    assert all(relative(a, b) < 1e-9 for a, b in zip(*found, strict=True))


def test_compiled_for_real():
    """The compiler's own code, in float32, both graphs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    options = {"size": 8, "dtype": torch.float32, "batch_size": None, "steps": 2}
    found, states = [], []
    for engine in ("compiled", "generic"):
        net[1].reset_running_stats()
        found.append(gradients(net, engine, **options))
        states.append([b.clone() for b in net.buffers()])
    assert all(relative(a, b) < 1e-4 for a, b in zip(*found, strict=True))
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_a_training_is_the_generic_engines(graphs):
    net = Net(nn.BatchNorm2d).double()
    theta0, images = FlatModule(net).parameters()[None], torch.randn(10, 3, 16, 16, dtype=torch.float64)
    options = {"epochs": 2, "lr": 0.05, "batch_size": 5, "momentum": 0.9, "train_accuracy": True}
    found = [
        pydistill.train_students(
            net,
            theta0,
            images,
            torch.arange(10) % 4,
            engine=engine,
            generator=torch.Generator().manual_seed(2),
            **options,
        )
        for engine in ("compiled", "generic")
    ]
    assert relative(found[0].theta, found[1].theta) < 1e-12
    assert torch.equal(found[0].train_accuracy, found[1].train_accuracy)
    for name, buffer in found[1].buffers.items():
        torch.testing.assert_close(found[0].buffers[name], buffer, rtol=1e-12, atol=1e-14)


def test_no_convolution_more_than_it_takes(graphs):
    """Eight of a layer's size in the adjoint: its gradient's own two, and twice two for the tangents. The images do not
    move, so the first layer has six fewer."""
    net = Net().double()
    students, theta = CompiledStudents(FlatModule(net), "hard", None, 3, "ieee"), FlatModule(net).parameters()[None]
    batch = Batch(torch.randn(9, 3, 16, 16, dtype=torch.float64), torch.arange(9) % 4, False)
    students.gradient(theta, batch, None, None)
    wanted = {"curvature": True, "images": True, "labels": False}
    students.adjoint(theta, theta, theta.new_ones(1), batch, None, None, **wanted)
    counts = []
    for graph in graphs:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        backward = sum(sum(node.args[10]) for node in nodes if node.target is aten.convolution_backward.default)
        biases = sum(node.args[10][2] for node in nodes if node.target is aten.convolution_backward.default)
        forward = sum(node.target is aten.convolution.default for node in nodes)
        winograd = sum(node.target is torch.ops.pydistill.frozen_conv2d.default for node in nodes)
        weights = [node.args for node in nodes if node.target is torch.ops.pydistill.conv2d_weight_grad.default]
        pairs = sum(1 if args[2] is None else 2 for args in weights)
        counts.append((forward + backward - biases + winograd + pairs, winograd, len(weights)))
    # gradient: forward and both backward, but no images' gradient; adjoint: see above, in the first layer the forward
    # pass, its tangent along the weight, two gradients in the images and one in the weight
    assert counts == [(3 * 3 - 1, 2, 2), (2 * 8 + 5, 2 * 5, 2)]  # both tangents of a weight's gradient in one call


def test_structures_share_graphs_and_attributes_part_them(graphs):
    class Scaled(Net):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x)

    for _ in range(2):
        gradients(Scaled(), "compiled", batch_size=None)
    assert len(graphs) == 2
    other = Scaled()
    other.factor = 2.0
    truth = gradients(other, "generic", batch_size=None)
    assert all(
        relative(a, b) < 1e-10 for a, b in zip(gradients(other, "compiled", batch_size=None), truth, strict=True)
    )
    assert len(graphs) == 4


class Draws(nn.Module):
    def forward(self, x):
        return x * random.random()


class Remembers(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return x


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.tensor(2.0)

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda: nn.Dropout(0.5), "draws no random numbers"),
        (Draws, "draws no random numbers"),
        (Remembers, "Remembers changes 'calls'"),
        (Branches, "can be traced"),
        (Holds, "numbers and strings alone, but one keeps a Tensor"),
    ],
)
def test_what_is_not_compiled_says_why(after, reason, graphs):
    net = Net(after=after())
    with pytest.raises(ValueError, match=f"engine: expected a net .*{reason}"):
        gradients(net, "compiled")
    assert not graphs
    assert vars(net.after).get("calls", 0) == 0


def test_hooks_are_refused(graphs):
    net = Net()
    net.conv2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="expected a net without hooks, but Conv2d 'conv2' has some"):
        gradients(net, "compiled")


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "_steps", type(compiled._steps)())
    monkeypatch.setattr(torch, "compile", lambda graph, **_: lambda *given: [1.01 * t for t in graph(*given)])
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 4))
    with pytest.raises(
        ValueError, match=r"compiled step computes what the net does, but \w+ of the gradient is 0\.01 off"
    ):
        gradients(net, "compiled", 8)


class Shared(nn.Module):
    """One convolution on images of two sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.conv(F.relu(self.first(x)))
        return self.head(self.conv(F.avg_pool2d(F.relu(x), 2)).mean((2, 3)))


@pytest.mark.usefixtures("graphs")
def test_a_layer_that_sees_two_sizes():
    net = Shared()
    found, truth = (gradients(net, engine, 16) for engine in ("compiled", "generic"))
    for a, b in zip(found, truth, strict=True):
        assert relative(a, b) < 1e-10


def test_what_float32_leaves_open_is_decided_in_float64(monkeypatch):
    """Small batches of deep networks, where one ReLU opened by rounding is a hundredth of the gradient."""
    seen = []
    monkeypatch.setitem(compiled._TOLERANCES, torch.float32, -1.0)
    monkeypatch.setattr(compiled, "_steps", type(compiled._steps)())
    monkeypatch.setattr(
        torch, "compile", lambda graph, **_: lambda *given: seen.append(given[0].dtype) or graph(*given)
    )
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 4))
    found, truth = (gradients(net, engine, 8, dtype=torch.float32) for engine in ("compiled", "generic"))
    assert torch.float64 in seen
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_wrong_step_in_float32_is_wrong_in_float64_too(monkeypatch):
    monkeypatch.setattr(compiled, "_steps", type(compiled._steps)())
    monkeypatch.setattr(torch, "compile", lambda graph, **_: lambda *given: [1.05 * t for t in graph(*given)])
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 4))
    with pytest.raises(ValueError, match=r"what the net does, but \w+ of the gradient is 0\.05 off"):
        gradients(net, "compiled", 8, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "full"}, "mode='full' is autograd"),
        ({"memory": 1 << 20}, "memory: expected 'auto', the compiled engine"),
    ],
)
def test_what_it_does_not_take(options, reason):
    with pytest.raises(ValueError, match=reason):
        gradients(Net(), "compiled", **options)


def test_families_without_it_say_so():
    net = Net()
    theta, images = FlatModule(net).parameters(), torch.randn(4, 3, 16, 16)
    for call in (
        lambda: pydistill.matching.class_gradients(net, theta, images, torch.arange(4), engine="compiled"),
        lambda: pydistill.matching.features(net, theta, images, engine="compiled"),
    ):
        with pytest.raises(ValueError, match="expected 'auto', 'student' or 'generic', got 'compiled'"):
            call()
