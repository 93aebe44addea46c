"""The ConvNet step with every norm, activation and pool of the method repositories, against autograd."""

import pytest
import torch

from pydistill.ops import (
    ConvNetShape,
    convnet_features,
    convnet_features_backward,
    convnet_gradient,
    convnet_logits,
    convnet_tangent,
)
from pydistill.ops.convnet_step import Workspace, tape_bytes
from tests.ops.test_convnet_step import check_tangent, check_tape, cosine, problem, relative

NORMS = ("instance", "batch", "group", "layer", "none", "running")
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh", "swish")
POOLS = ("avg", "max", "none")


def shape_of(norm="instance", activation="relu", pool="avg", biased=True, size=(3, 13, 11), widths=(12, 20), **more):
    groups = {"group": 4}.get(norm, 1)
    options = {"norm": norm, "groups": groups, "activation": activation, "pool": pool, "biased": biased, **more}
    return ConvNetShape(*size, widths, 1, 5, **options)


def running_of(shape, dtype=torch.float64):
    if shape.norm != "running":
        return None
    g = torch.Generator().manual_seed(5)
    means, variances = torch.randn(2, sum(shape.widths), generator=g, dtype=torch.float64).to(dtype)
    return torch.stack([means, 0.5 + variances.square()])


# every pair of two of the three, and each with and without biases somewhere
CASES = [shape_of(norm, activation, POOLS[(i + j) % 3], (i + j) % 2 == 0) for i, norm in enumerate(NORMS)
         for j, activation in enumerate(ACTIVATIONS)]  # fmt: skip
CASES += [shape_of(norm, "relu", pool) for norm in NORMS for pool in POOLS if (norm, pool) != ("instance", "avg")]
CASES += [
    shape_of("batch", widths=(16, 24, 40), size=(3, 32, 32)),
    shape_of("batch", widths=(20,), size=(1, 9, 9)),
    shape_of("group", "leaky_relu", "max", widths=(64, 64, 64), size=(3, 16, 16), slope=0.2),
    shape_of("layer", "tanh", "none", size=(1, 8, 8), widths=(8, 8, 8)),
]


def name_of(shape):
    plain = "" if shape.biased else "-without-bias"
    size = f"{shape.channels}x{shape.height}x{shape.width_px}"
    return f"{shape.norm}-{shape.activation}-{shape.pool}{plain}-{size}-{'-'.join(map(str, shape.widths))}"


@pytest.mark.parametrize("shape", CASES, ids=name_of)
def test_equals_autograd(shape):
    kind = ("hard", "logits", "probs")[len(name_of(shape)) % 3]
    theta, direction, images, labels = problem(shape, 9, E=2, kind=kind)
    given = {"running": running_of(shape)}
    truth = convnet_logits(shape, theta, images, **given, backend="reference")
    assert relative(convnet_logits(shape, theta, images, **given), truth) < 1e-12
    given["label_kind"] = kind
    truth = convnet_gradient(shape, theta, images, labels, **given, backend="reference")
    actual = convnet_gradient(shape, theta, images, labels, **given)
    assert [relative(a, t) < 1e-11 for a, t in zip(actual, truth, strict=True)] == [True, True]
    truth = convnet_tangent(shape, theta, direction, images, labels, **given, backend="reference")
    actual = convnet_tangent(shape, theta, direction, images, labels, **given)
    check_tangent(actual, truth, 1e-10)
    for i, (a, t) in enumerate(zip(shape.slices(actual[1]), shape.slices(truth[1]), strict=True)):
        assert (a - t).abs().max() < 1e-10 * t.abs().max().clamp_min(1e-3 * truth[1].abs().max()), i


@pytest.mark.parametrize("p", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("norm", NORMS)
def test_features_equal_autograd(norm, p):
    shape = shape_of(norm, "leaky_relu" if norm != "layer" else "swish", "max")
    theta, _, images, _ = problem(shape, 7, E=2)
    options = {"p": p, "attended": (0, 1), "running": running_of(shape)}
    truth = convnet_features(shape, theta, images, axis="both", **options, backend="reference")
    actual = convnet_features(shape, theta, images, axis="both", **options)
    assert [relative(a, t) < 1e-12 for a, t in zip(actual, truth, strict=True)] == [True] * 3
    g = torch.Generator().manual_seed(2)
    grads = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in truth]
    wanted = convnet_features_backward(shape, theta, images, *grads, **options, backend="reference")
    assert relative(convnet_features_backward(shape, theta, images, *grads, **options), wanted) < 1e-11
    tape = torch.empty(tape_bytes(shape, 2, 7, theta.dtype), dtype=torch.uint8)
    convnet_features(shape, theta, images, axis="both", **options, tape=tape)
    found = convnet_features_backward(shape, theta, images, *grads, **options, tape=tape)
    assert relative(found, wanted) < 1e-11
    for k in range(3):  # one at a time, the others absent
        alone = [grad if i == k else None for i, grad in enumerate(grads)]
        wanted = convnet_features_backward(shape, theta, images, *alone, **options, backend="reference")
        assert relative(convnet_features_backward(shape, theta, images, *alone, **options), wanted) < 1e-11


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_tape_changes_no_bit(norm):
    check_tape(shape_of(norm, "leaky_relu", "max"))


def test_statistics_are_those_of_the_batch():
    shape = shape_of("batch", widths=(12, 20, 7), size=(3, 19, 23))
    theta, _, images, labels = problem(shape, 9, E=3, own_images=True)
    found, truth = torch.empty(2, 3, 2, 39, dtype=torch.float64)
    convnet_gradient(shape, theta, images, labels, statistics=found)
    convnet_gradient(shape, theta, images, labels, statistics=truth, backend="reference")
    assert relative(found, truth) < 1e-13


def test_students_have_running_statistics_of_their_own():
    shape = shape_of("running")
    theta, _, images, labels = problem(shape, 5, E=2)
    own = torch.stack([running_of(shape), 2 * running_of(shape)])
    found = convnet_gradient(shape, theta, images, labels, running=own)
    for e in range(2):
        alone = convnet_gradient(shape, theta[e : e + 1], images, labels, running=own[e], backend="reference")
        assert relative(found[1][e : e + 1], alone[1]) < 1e-12


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_equal_bits_over_threads(norm):
    shape = shape_of(norm, "leaky_relu", "max", widths=(20, 7, 33), size=(3, 19, 23))
    theta, direction, images, labels = problem(shape, 40, E=2, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(convnet_tangent(shape, theta, direction, images, labels))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_float32_and_bf16(norm):
    """Against float64, and one workspace for both."""
    shape = shape_of(norm, "leaky_relu", "max", widths=(32, 32, 32), size=(3, 32, 32))
    theta, direction, images, labels = problem(shape, 12)
    theta, direction = theta / 2, direction / 2
    truth = convnet_tangent(shape, theta, direction, images, labels)
    single = [t.float() if t.is_floating_point() else t for t in (theta, direction, images, labels)]
    theirs = convnet_tangent(shape, *single, backend="reference")
    workspace = Workspace()
    ours = convnet_tangent(shape, *single, workspace=workspace)
    half = convnet_tangent(shape, *single, precision="bf16", workspace=workspace)
    for a, b, h, t in zip(ours[:3], theirs[:3], half[:3], truth[:3], strict=True):
        assert relative(a, t) <= 3 * relative(b, t) + 1e-6
        assert not torch.equal(a, h)
        assert cosine(h, t) > 0.99


def test_odd_batches_share_out_over_slots():
    """Batches whose slots hold unequal numbers of images, and single images."""
    shape = shape_of("batch", size=(3, 8, 8), widths=(8, 8))
    for N in (1, 2, 3, 5, 17, 130):
        theta, direction, images, labels = problem(shape, N, E=1)
        truth = convnet_tangent(shape, theta, direction, images, labels, backend="reference")
        actual = convnet_tangent(shape, theta, direction, images, labels)
        assert [relative(a, t) < 1e-10 for a, t in zip(actual[:3], truth[:3], strict=True)] == [True] * 3, N


def test_bad_input():
    with pytest.raises(ValueError, match="norm: expected one of"):
        ConvNetShape(3, 8, 8, (8,), 1, 3, norm="spectral")
    with pytest.raises(ValueError, match=r"groups: expected a divisor of every width \(8, 6\), got 4"):
        ConvNetShape(3, 8, 8, (8, 6), 1, 3, norm="group", groups=4)
    shape = shape_of("batch", pool="none", size=(3, 1, 1))
    theta, _, images, labels = problem(shape, 1)
    with pytest.raises(ValueError, match="images: expected more than one value a channel for a batch norm"):
        convnet_gradient(shape, theta, images, labels)
    shape = shape_of("running")
    theta, _, images, labels = problem(shape, 3)
    with pytest.raises(ValueError, match="running: expected statistics for the norm 'running' alone"):
        convnet_gradient(shape, theta, images, labels)
    with pytest.raises(
        ValueError, match=r"running: expected torch.float64 \[2, 32\] on cpu as theta, got torch.float32"
    ):
        convnet_gradient(shape, theta, images, labels, running=running_of(shape, torch.float32))
    with pytest.raises(ValueError, match="statistics: expected them of the norm 'batch' alone"):
        convnet_gradient(shape, theta, images, labels, running=running_of(shape), statistics=torch.empty(1))
