"""The layer-by-layer ConvNet step against autograd through `pydistill.nn.ConvNet`."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pydistill.nn import ConvNet
from pydistill.ops import _convnet_step_layers as layers
from pydistill.reference.convnet_shape import ConvNetShape
from pydistill.trajectory.flat import FlatModule

KINDS = ("hard", "logits", "probs")
# channels, image size, widths' common value, depth
NETS = {
    "depth 1": (3, (6, 8), 4, 1),
    "depth 2, odd": (3, (9, 7), 5, 2),
    "depth 3": (2, (16, 16), 4, 3),
    "one channel": (1, (8, 6), 3, 2),
    "last plane of one": (3, (4, 4), 3, 2),
}
OUTPUTS = ("slope", "curvature", "images_grad", "labels_grad")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # at these sizes a thread pool on a busy machine mostly waits at its barriers
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Problem:
    """A net, E students and a batch, drawn in float64 and rounded to a dtype."""

    def __init__(self, net, *, students, shared, label_kind, dtype=torch.float64, images=5, classes=4):
        channels, size, width, depth = net
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = ConvNet(channels, classes, width, depth, size).to(dtype)
        self.shape = ConvNetShape(channels, *size, (width,) * depth, 3 if channels == 1 else 1, classes)
        self.flat, self.label_kind, self.students = FlatModule(self.net), label_kind, students
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes):
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        front = () if shared else (students,)
        start = self.flat.parameters().double()
        self.theta = (start + 0.1 * draw(students, self.flat.numel)).to(dtype)
        self.direction = draw(students, self.flat.numel).to(dtype)
        self.images = draw(*front, images, channels, *size).to(dtype)
        if label_kind == "hard":
            self.labels = torch.randint(classes, (*front, images), generator=generator)
        else:  # probabilities that do not add up to 1, as scaled or truncated ones do not
            self.labels = draw(*front, images, classes).to(dtype)
            self.labels = self.labels.abs() if label_kind == "probs" else self.labels

    def of(self, student):
        """theta, direction, images and labels of one student."""
        shared = self.images.dim() == 4
        batch = (self.images, self.labels) if shared else (self.images[student], self.labels[student])
        return self.theta[student], self.direction[student], *batch

    def loss(self, theta, images, labels):
        return F.cross_entropy(self.flat(theta, images), labels.softmax(1) if self.label_kind == "logits" else labels)

    def truth(self):
        """By autograd, student by student: logits, loss, gradient and `OUTPUTS`."""
        found = []
        for student in range(self.students):
            theta, direction, images, labels = (t.detach().clone() for t in self.of(student))
            wanted = [theta.requires_grad_(), images.requires_grad_()]
            if self.label_kind != "hard":
                wanted.append(labels.requires_grad_())
            loss = self.loss(theta, images, labels)
            (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
            slope = grad @ direction
            derivatives = torch.autograd.grad(slope, wanted)
            found.append([t.detach() for t in (self.flat(theta, images), loss, grad, slope, *derivatives)])
        names = ("logits", "loss", "gradient", *OUTPUTS)
        return dict(zip(names, map(torch.stack, zip(*found, strict=True)), strict=False))

    def engine(self, precision="fp32"):
        options = {"label_kind": self.label_kind, "precision": precision}
        loss, gradient = layers.gradient(self.shape, self.theta, self.images, self.labels, **options)
        derivatives = layers.tangent(self.shape, self.theta, self.direction, self.images, self.labels, **options)
        found = {"logits": layers.logits(self.shape, self.theta, self.images, precision=precision)}
        found |= {"loss": loss, "gradient": gradient, **dict(zip(OUTPUTS, derivatives, strict=True))}
        return {name: value for name, value in found.items() if value is not None}


def relative(value, truth):
    assert value.shape == truth.shape
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_each_parameter_close(problem, value, truth, bound):
    """One by one, because an error in a small one could hide behind the large ones."""
    for i, (v, t) in enumerate(zip(problem.shape.slices(value), problem.shape.slices(truth), strict=True)):
        if i % 4 == 1 and i < 4 * len(problem.shape.layers):  # the convolution's bias, which the norm subtracts again
            assert not v.any()
            assert t.norm() < 1e-12 * truth.norm()
        else:
            assert relative(v, t) < bound, problem.flat.names[i]


@pytest.mark.parametrize("label_kind", KINDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("students", [1, 3])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_float64_is_autograd(net, students, shared, label_kind):
    problem = Problem(net, students=students, shared=shared, label_kind=label_kind)
    found, truth = problem.engine(), problem.truth()
    assert set(found) == set(truth)
    for name, value in found.items():
        assert value.dtype == torch.float64
        assert relative(value, truth[name]) < 1e-10, name
    assert_each_parameter_close(problem, found["gradient"], truth["gradient"], 1e-10)
    assert_each_parameter_close(problem, found["curvature"], truth["curvature"], 1e-10)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_what_is_kept_changes_no_bit(net, precision):
    problem = Problem(net, students=2, shared=True, label_kind="logits", dtype=torch.float32)
    options = {"label_kind": "logits", "precision": precision}
    first, batch = (problem.shape, problem.theta), (problem.images, problem.labels)
    loss, grad, *kept = layers.gradient(*first, *batch, **options, keep=True)
    assert all(map(torch.equal, (loss, grad), layers.gradient(*first, *batch, **options)))
    bytes_kept = layers.kept_bytes(problem.shape, 2, len(problem.images), torch.float32, precision)
    assert sum(t.nbytes for t in kept) == bytes_kept
    plain = layers.tangent(*first, problem.direction, *batch, **options)
    assert all(map(torch.equal, layers.tangent(*first, problem.direction, *batch, *kept, **options), plain))
    kept[-1].zero_()  # the features
    assert not torch.equal(layers.tangent(*first, problem.direction, *batch, *kept, **options)[0], plain[0])


SENSIBLE = (3, (32, 32), 32, 3)


@pytest.fixture(scope="module")
def sensible():
    """A float32 problem of a sensible size with its truth in float64, and torch's own float32 results."""
    made = {"students": 2, "shared": True, "label_kind": "logits", "images": 16, "classes": 10}
    single, double = Problem(SENSIBLE, **made, dtype=torch.float32), Problem(SENSIBLE, **made)
    for name in ("theta", "direction", "images", "labels"):
        setattr(double, name, getattr(single, name).double())
    return single, double.truth(), single.truth()


def test_float32_is_as_close_as_autograd(sensible):
    problem, truth, plain = sensible
    for name, value in problem.engine().items():
        assert value.dtype == torch.float32
        # an activation within rounding of zero may fall on the ReLU's other side in one and not in the other
        assert relative(value, truth[name]) < 2 * relative(plain[name], truth[name]) + 1e-3, name


def test_bfloat16_points_the_same_way(sensible):
    problem, truth, _ = sensible
    for name, value in problem.engine("bf16").items():
        assert value.dtype == torch.float32
        cosine = F.cosine_similarity(value.double().flatten(), truth[name].flatten(), 0)
        assert cosine > 0.99, name
        assert relative(value, truth[name]) < 0.15, name


class Layouts(TorchDispatchMode):
    """Dtypes, sizes and strides of what convolutions are given, and what they and the blocks give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        convolution = function in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
        if convolution or "instance_norm_relu_avg_pool" in str(function):
            for tensor in (*(args if convolution else ()), *(out if isinstance(out, tuple) else (out,))):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    self.seen.append((str(function), tensor.dtype, tensor.shape, tensor.stride()))
        return out


@pytest.mark.parametrize("students", [1, 2])
@pytest.mark.parametrize("net", ["depth 3", "one channel"])
@pytest.mark.parametrize("precision", ["ieee", "tf32-matmul", "tf32", "tf32-conv", "bf16"])
def test_convolutions_on_tensor_cores_run_channels_last(precision, net, students):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    last = precision not in ("ieee", "tf32-matmul")
    problem = Problem(NETS[net], students=students, shared=True, label_kind="logits", dtype=torch.float32)
    with Layouts() as found:
        problem.engine(precision)
    assert len(found.seen) > 40
    for name, type_of, (_, C, H, W), strides in found.seen:
        assert type_of == dtype, name
        wanted = (C * H * W, 1, W * C, C) if last else (C * H * W, H * W, W, 1)
        assert strides == wanted or C == 1, (name, (C, H, W))


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [
        *(("ieee", ("ieee", "ieee")), ("fp32", ("ieee", "ieee")), ("bf16", ("ieee", "ieee"))),
        *(("tf32", ("tf32", "tf32")), ("tf32-conv", ("tf32", "ieee")), ("tf32-matmul", ("ieee", "tf32"))),
    ],
)
def test_precision_sets_the_switches_for_the_time_of_a_step(sensible, monkeypatch, precision, wanted):
    problem, *_ = sensible
    cudnn, seen, convolve = torch.backends.cudnn, [], layers._Net.convolve

    def switches():
        rounding = (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
        return (*rounding, cudnn.deterministic, cudnn.benchmark, torch.is_autocast_enabled("cuda"))

    def watch(*args):
        seen.append(switches())
        return convolve(*args)

    monkeypatch.setattr(layers._Net, "convolve", watch)
    monkeypatch.setattr(cudnn, "benchmark", True)
    torch.set_autocast_enabled("cuda", True)
    try:
        before = switches()
        problem.engine(precision)
        assert switches() == before
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert set(seen) == {(*wanted, True, False, False)}


def test_no_autograd_graph_is_made():
    problem = Problem(NETS["depth 3"], students=3, shared=True, label_kind="probs")
    for tensor in (problem.theta, problem.direction, problem.images, problem.labels):
        tensor.requires_grad_()

    def refuse(tensor):
        raise AssertionError("a tensor was saved for a backward pass")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
        found = problem.engine()
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("label_kind", KINDS)
def test_nothing_leaves_the_device_or_asks_it_for_a_value(label_kind, shared, precision):
    # tensors without values refuse both; only code that runs on them can be captured in a CUDA graph
    problem = Problem(NETS["depth 3"], students=3, shared=shared, label_kind=label_kind, dtype=torch.float32)
    expected = problem.engine(precision)
    for name in ("theta", "direction", "images", "labels"):
        setattr(problem, name, getattr(problem, name).to("meta"))
    for name, value in problem.engine(precision).items():
        assert value.device.type == "meta"
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("students", [1, 3])
def test_strides_do_not_matter(students, precision):
    problem = Problem(NETS["depth 3"], students=students, shared=False, label_kind="logits", dtype=torch.float32)
    dense = problem.engine(precision)
    problem.theta = problem.theta.T.contiguous().T
    problem.direction = torch.stack([problem.direction, problem.direction], -1)[..., 0]
    problem.images = problem.images.transpose(-1, -3).contiguous().transpose(-1, -3)
    problem.labels = problem.labels.mT.contiguous().mT
    for name, value in problem.engine(precision).items():
        assert torch.equal(value, dense[name]), name


def test_students_do_not_see_each_other():
    problem = Problem(NETS["depth 3"], students=3, shared=False, label_kind="logits")
    together = problem.engine()
    for student in range(3):
        alone = Problem(NETS["depth 3"], students=1, shared=True, label_kind="logits")
        theta, direction, alone.images, alone.labels = problem.of(student)
        alone.theta, alone.direction = theta[None], direction[None]
        for name, value in alone.engine().items():
            assert relative(value[0], together[name][student]) < 1e-12, name


def test_labels_of_each_student_on_shared_images():
    problem = Problem(NETS["depth 2, odd"], students=2, shared=True, label_kind="hard")
    one = problem.engine()
    problem.labels = torch.stack([problem.labels, (problem.labels + 1) % 4])
    two = problem.engine()
    assert torch.equal(one["curvature"][0], two["curvature"][0])
    assert not torch.equal(one["loss"][1], two["loss"][1])


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        (ValueError, "theta", {"theta": torch.zeros(2, 7, dtype=torch.float64)}),
        (TypeError, "theta", {"theta": torch.zeros(2, 3, dtype=torch.int64)}),
        (ValueError, "images", {"images": torch.zeros(5, 3, 4, 8, dtype=torch.float64)}),
        (ValueError, "images", {"images": torch.zeros(3, 5, 3, 6, 8, dtype=torch.float64)}),
        (ValueError, "images", {"images": torch.zeros(0, 3, 6, 8, dtype=torch.float64)}),
        (TypeError, "images", {"images": torch.zeros(5, 3, 6, 8)}),
        (ValueError, "labels", {"labels": torch.zeros(4, dtype=torch.int64)}),
        (TypeError, "labels", {"labels": torch.zeros(5)}),
        (TypeError, "labels", {"label_kind": "probs"}),
        (ValueError, "label_kind", {"label_kind": "soft"}),
        (ValueError, "precision", {"precision": "fp16"}),
        (TypeError, "precision", {"precision": "bf16"}),
    ],
)
def test_what_does_not_fit_is_named(error, name, changes):
    problem = Problem(NETS["depth 1"], students=2, shared=True, label_kind="hard")
    arguments = {"theta": problem.theta, "images": problem.images, "labels": problem.labels} | changes
    for call in (layers.gradient, lambda *a, **k: layers.tangent(*a, direction=arguments["theta"], **k)):
        with pytest.raises(error, match=f"^{name}: expected"):
            call(problem.shape, **arguments)


def test_a_direction_of_another_shape_is_refused():
    problem = Problem(NETS["depth 1"], students=2, shared=True, label_kind="hard")
    with pytest.raises(ValueError, match=r"^direction: expected"):
        layers.tangent(problem.shape, problem.theta, problem.direction[:1], problem.images, problem.labels)


def test_shape_is_the_convnet():
    for channels, size, width, depth in NETS.values():
        net = ConvNet(channels, 4, width, depth, size)
        shape = ConvNetShape(channels, *size, (width,) * depth, 3 if channels == 1 else 1, 4)
        assert shape.parameter_shapes == tuple(tuple(p.shape) for p in net.parameters())
        assert shape.numel == sum(p.numel() for p in net.parameters())
        assert shape.features == net.classifier.in_features


@pytest.mark.parametrize(
    "changes", [{"widths": ()}, {"widths": (4, 0)}, {"classes": 0}, {"height": 3}, {"first_padding": -1}]
)
def test_a_shape_that_cannot_be_is_refused(changes):
    sizes = {"channels": 3, "height": 8, "width_px": 8, "widths": (4, 4), "first_padding": 1, "classes": 2} | changes
    with pytest.raises(ValueError, match=r"expected|leave nothing"):
        ConvNetShape(**sizes)
