"""The operators and the ConvNet step on a CUDA device, held to the CPU."""

import os
from dataclasses import dataclass

import pytest
import torch
from test_convnet_step_layers import KINDS, NETS, OUTPUTS, SENSIBLE, Problem, relative

from pydistill import matching
from pydistill.augment import MultiCrop
from pydistill.nn import ConvNet
from pydistill.ops import _convnet_step_layers as layers
from pydistill.ops import attention_map, attention_map_divergence, row_products
from pydistill.ops._convnet_step_graph import StepGraphs

# cuBLAS is deterministic, as every test here asks it to be, only with a workspace of fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPS = torch.ops.pydistill
OPTIONS = (1e-5, True, True)


@pytest.fixture(autouse=True)
def _no_tf32():
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@dataclass
class Inputs:
    """Of the block's four forms."""

    primal: tuple
    direction: tuple
    grad: tuple  # grad_y and its tangent

    def to(self, device, dtype):
        """Images in dtype; per-channel vectors in what the kernels compute in."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        groups = (self.primal, self.direction, self.grad)
        return Inputs(*(tuple(t.to(device, dtype if t.dim() == 4 else compute) for t in group) for group in groups))

    def forms(self):
        y = OPS.instance_norm_relu_avg_pool(*self.primal, *OPTIONS)
        backward = OPS.instance_norm_relu_avg_pool_backward(self.grad[0], *self.primal, *OPTIONS)
        jvp = OPS.instance_norm_relu_avg_pool_jvp(*self.primal, *self.direction, *OPTIONS)
        both = OPS.instance_norm_relu_avg_pool_backward_jvp(*self.grad, *self.primal, *self.direction, *OPTIONS)
        return [y, *backward, jvp, *both]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (3, 33, 7, 5), (4, 128, 32, 32), (2, 16, 112, 112)], ids=str)
def test_block(shape, channels_last, dtype):
    N, C, H, W = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw(*sizes):
        values = torch.randn(sizes, dtype=torch.float64).to(dtype).double()  # exact in dtype
        return values.contiguous(memory_format=layout) if len(sizes) == 4 else values.float().double()

    inputs = Inputs(
        (draw(N, C, H, W), draw(C), draw(C)),
        (draw(N, C, H, W), draw(C), draw(C)),
        (draw(N, C, H // 2, W // 2), draw(N, C, H // 2, W // 2)),
    )
    truths = inputs.to("cpu", torch.float64).forms()
    cpu = inputs.to("cpu", dtype).forms()
    for i, (value, plain, truth) in enumerate(zip(inputs.to("cuda", dtype).forms(), cpu, truths, strict=True)):
        floor = 1e-11 if dtype == torch.float64 else 1e-3
        assert relative(value.cpu(), truth) <= max(floor, 2 * relative(plain, truth)), i


def on_cuda(problem):
    for name in ("theta", "direction", "images", "labels"):
        setattr(problem, name, getattr(problem, name).cuda())
    return problem


def run(step, problem, precision="fp32"):
    options = {"label_kind": problem.label_kind, "precision": precision}
    batch = (problem.images, problem.labels)
    found = dict(zip(("loss", "gradient"), step.gradient(problem.shape, problem.theta, *batch, **options), strict=True))
    derivatives = step.tangent(problem.shape, problem.theta, problem.direction, *batch, **options)
    found |= zip(OUTPUTS, derivatives, strict=True)
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("label_kind", KINDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("students", [1, 3])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_step_float64(net, students, shared, label_kind):
    options = {"students": students, "shared": shared, "label_kind": label_kind}
    truth = Problem(net, **options).truth()
    for name, value in run(layers, on_cuda(Problem(net, **options))).items():
        assert relative(value.cpu(), truth[name]) < 1e-10, name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("students", [1, 5])
def test_step_precisions(students, precision):
    options = {"students": students, "shared": True, "label_kind": "hard", "images": 16, "classes": 10}
    single = Problem(SENSIBLE, **options, dtype=torch.float32)
    truth = single.truth()
    for name, value in run(layers, on_cuda(single), precision).items():
        if precision == "fp32":
            assert relative(value.cpu(), truth[name]) < 2e-3, name
        elif name != "slope":  # a sum of terms that all but cancel
            assert torch.cosine_similarity(value.cpu().flatten(), truth[name].flatten(), 0) > 0.99, name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_graphs_are_the_layers_bit_for_bit(precision):
    graphs = StepGraphs()
    kept = []
    for seed, images, students in [(0, 16, 2), (1, 16, 2), (2, 7, 2), (3, 16, 1), (4, 16, 2)]:
        options = {"students": students, "shared": True, "label_kind": "logits", "images": images}
        problem = on_cuda(Problem(SENSIBLE, **options, dtype=torch.float32))
        problem.theta += 0.01 * seed
        problem.images *= 1 + 0.1 * seed
        kept.append((run(graphs, problem, precision), run(layers, problem, precision)))
    # all at the end: a later replay must not have written into an earlier result
    for replayed, direct in kept:
        for name, value in replayed.items():
            assert torch.equal(value, direct[name]), name
    assert len(graphs._steps) == 2 * 3


def derivatives(function, tensors):
    """Values and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


MATCHING = {
    "attention_map": (
        lambda x: torch.cat(attention_map(x, 4.0, "both"), 1),
        [(3, 37, 9, 11)],
    ),
    "row_products": (lambda a, b: row_products(a, b, [(1, 30, 27), (900, 5, 1152)]), [(2, 7000), (2, 7000)]),
    "attention_map_divergence": (
        lambda q, k: attention_map_divergence(q, k, q.detach().flip(-1), k.detach().flip(-1), kind="jsd"),
        [(2, 3, 197, 64), (2, 3, 197, 64)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MATCHING)
def test_matching_operators(name, dtype):
    """Triton's kernels, which "auto" picks."""
    function, shapes = MATCHING[name]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    truths = derivatives(function, [t.double() for t in tensors])
    plain = derivatives(function, tensors)
    for value, cpu, truth in zip(derivatives(function, [t.cuda() for t in tensors]), plain, truths, strict=True):
        assert relative(value.cpu(), truth) <= max(1e-5, 2 * relative(cpu, truth))


def test_features_and_class_gradients():
    """What runs on autograd here, or layer by layer, agrees with the CPU's engine."""
    net = ConvNet(3, 4, width=16, depth=2, image_size=16)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 4
    found = []
    for device in ("cpu", "cuda"):
        x = images.to(device).requires_grad_()
        features = matching.features(net.to(device), theta.to(device), x, axis="both")
        loss = sum(t.square().sum() for t in (*features.spatial, *features.channel, features.embedding))
        grads = matching.class_gradients(net, theta.to(device), x, labels)
        values = [*features.spatial, *features.channel, features.embedding, grads]
        values += [*torch.autograd.grad(loss, x), *torch.autograd.grad(grads.square().sum(), x)]
        found.append([value.detach().cpu() for value in values])
    for cpu, gpu in zip(*found, strict=True):
        assert relative(gpu, cpu) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", [None, "mixup", "cutmix", "mosaic"])
def test_multi_crop_is_that_of_the_cpu(mix, dtype):
    """Results, the images' and the base's gradients, in float64 on the CPU; and again bit for bit."""
    generator = torch.Generator().manual_seed(0)
    augment = MultiCrop((50, 61), roll=9, mix=mix, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images, base = (torch.randn(n, 3, 64, 57, generator=generator).to(dtype) for n in (12, 1))
    record = augment.draw(images.shape, generator)

    def run(device, dtype):
        leaves = [t.to(device, dtype).requires_grad_() for t in (images, base)]
        out = augment(leaves[0], record, base=leaves[1])
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(images.dtype).to(device, dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    truths, found, again = run("cpu", torch.float64), run("cuda", dtype), run("cuda", dtype)
    bound = 4 * torch.finfo(dtype).eps + {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 0)
    for got, repeat, truth in zip(found, again, truths, strict=True):
        assert torch.equal(got, repeat)
        assert relative(got.cpu(), truth) <= bound
