"""Attention maps and embeddings of the engine against plain torch, values and adjoint, and the messages."""

import pytest
import torch

from pydistill.ops import ConvNetShape, convnet_features, convnet_features_backward
from pydistill.ops.convnet_step import Workspace, tape_bytes

# channels, height, width, padding of the first convolution, widths: odd sizes, padded channels, one block
NETS = {
    "three blocks": (3, 18, 15, 1, (8, 8, 8)),
    "digits": (1, 9, 11, 3, (5, 7)),
    "one block": (2, 6, 6, 1, (16,)),
    "whole vectors": (3, 16, 16, 1, (32, 32)),
}


def problem(name, dtype, students=2, images=5):
    channels, H, W, padding, widths = NETS[name]
    generator = torch.Generator().manual_seed(len(name))
    shape = ConvNetShape(channels, H, W, widths, padding, 4)
    theta = 0.3 * torch.randn(students, shape.numel, generator=generator, dtype=torch.float64)
    x = torch.randn(images, channels, H, W, generator=generator, dtype=torch.float64)
    return shape, theta.to(dtype), x.to(dtype)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, 2.5])
@pytest.mark.parametrize("name", NETS)
def test_values_and_adjoint_equal_autograd(name, p):
    shape, theta, x = problem(name, torch.float64)
    options = {"p": p, "attended": list(range(len(shape.layers)))}
    found = convnet_features(shape, theta, x, axis="both", **options)
    truth = convnet_features(shape, theta, x, axis="both", backend="reference", **options)
    for value, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in found]
    for given in (grads, [grads[0], None, None], [None, grads[1], None], [None, None, grads[2]], [None] * 3):
        got = convnet_features_backward(shape, theta, x, *given, **options)
        expected = convnet_features_backward(shape, theta, x, *given, backend="reference", **options)
        assert relative(got, expected) < 1e-10 if expected.norm() else not got.norm()


@pytest.mark.parametrize("attended", [(), (0,), (1,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("axis", ["spatial", "channel", "both"])
def test_blocks_and_axes_are_chosen(attended, axis):
    shape, theta, x = problem("three blocks", torch.float64)
    own = torch.stack([x, 2 * x + 1])  # a student's own images
    found = convnet_features(shape, theta, own, attended=attended, axis=axis)
    truth = convnet_features(shape, theta, own, attended=attended, axis=axis, backend="reference")
    for value, expected in zip(found, truth, strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    layers = [shape.layers[i] for i in attended]
    assert found[0].shape[2] == (0 if axis == "channel" else sum(at.height * at.width for at in layers))
    assert found[1].shape[2] == (0 if axis == "spatial" else sum(at.out_channels for at in layers))


@pytest.mark.parametrize("name", NETS)
def test_float32_is_as_right_as_torch(name):
    shape, theta, x = problem(name, torch.float64, images=40)
    options = {"attended": list(range(len(shape.layers)))}
    truth = convnet_features(shape, theta, x, axis="both", backend="reference", **options)
    single = (shape, theta.float(), x.float())
    plain = convnet_features(*single, axis="both", backend="reference", **options)
    for value, torchs, expected in zip(convnet_features(*single, axis="both", **options), plain, truth, strict=True):
        assert relative(value, expected) <= 2 * relative(torchs, expected) + 1e-6
    grads = [torch.randn_like(t) for t in truth]
    expected = convnet_features_backward(shape, theta, x, *grads, backend="reference", **options)
    found = convnet_features_backward(*single, *(g.float() for g in grads), **options)
    assert relative(found, expected) < 1e-4  # a unit may be within rounding of its ReLU's edge


def test_bf16_rounds_a_little():
    shape, theta, x = problem("whole vectors", torch.float32, images=20)
    theta = 0.3 * theta
    exact, rounded = (
        convnet_features(shape, theta, x, attended=(0, 1), axis="both", precision=precision)
        for precision in ("fp32", "bf16")
    )
    for value, expected in zip(rounded, exact, strict=True):
        assert 1e-5 < relative(value, expected) < 0.05
    grads = [torch.ones_like(t) for t in exact]
    a, b = (
        convnet_features_backward(shape, theta, x, *grads, attended=(0, 1), precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98


def test_equal_bits_over_threads_and_with_a_used_workspace():
    shape, theta, x = problem("digits", torch.float32, images=33)
    workspace, bits = Workspace(), []
    workspace.at_least(10_000_000).fill_(255)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = convnet_features(shape, theta, x, attended=(0, 1), axis="both", workspace=workspace)
        grads = [torch.ones_like(t) for t in found]
        bits.append((*found, convnet_features_backward(shape, theta, x, *grads, attended=(0, 1), workspace=workspace)))
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "precision"), [("digits", "fp32"), ("three blocks", "fp32"), ("whole vectors", "bf16")]
)
def test_a_tape_saves_the_second_forward_pass_and_changes_nothing(name, precision):
    shape, theta, x = problem(name, torch.float32, images=19)
    blocks = (0, 1)
    tape = torch.empty(tape_bytes(shape, 2, 19, torch.float32, precision), dtype=torch.uint8)
    options = {"attended": blocks, "precision": precision}
    plain = convnet_features(shape, theta, x, axis="both", **options)
    taped = convnet_features(shape, theta, x, axis="both", **options, tape=tape)
    assert all(torch.equal(a, b) for a, b in zip(plain, taped, strict=True))
    grads = [torch.linspace(-1, 2, t.numel()).view_as(t) for t in plain]
    truth = convnet_features_backward(shape, theta, x, *grads, **options)
    for _ in range(2):
        found = convnet_features_backward(shape, theta, x, *grads, **options, tape=tape)
        assert relative(found, truth) < (1e-5 if precision == "fp32" else 0.05)  # a bf16 tape is rounded


def test_what_is_not_finite_stays_so():
    shape, theta, x = problem("digits", torch.float32, students=1)
    x[2, 0, 3, 3] = float("nan")
    spatial, _, embedding = convnet_features(shape, theta, x, attended=(0,))
    assert spatial[0, 2].isnan().any()
    assert embedding[0, 2].isnan().any()
    others = [0, 1, 3, 4]
    assert torch.isfinite(spatial[0, others]).all()
    assert torch.isfinite(embedding[0, others]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"p: expected a finite number above zero, got 0\.0"),
        ({"attended": (2,)}, r"attended: expected ascending blocks out of 0\.\.1, got \[2\]"),
        ({"attended": (1, 0)}, r"attended: expected ascending blocks out of 0\.\.1, got \[1, 0\]"),
        ({"attended": (0, 0)}, r"attended: expected ascending blocks out of 0\.\.1, got \[0, 0\]"),
        ({"axis": "time"}, "axis: expected 'spatial', 'channel' or 'both', got 'time'"),
        (
            {"precision": "fp8"},
            "precision: expected 'auto', 'ieee', .* or 'tf32-matmul', got 'fp8'",
        ),
    ],
)
def test_bad_input_is_named(options, message):
    shape, theta, x = problem("digits", torch.float32)
    with pytest.raises(ValueError, match=message):
        convnet_features(shape, theta, x, **options)


def test_gradients_that_do_not_fit_are_named():
    shape, theta, x = problem("digits", torch.float32)
    with pytest.raises(ValueError, match=r"spatial_grad: expected torch.float32 \[2, 5, 195\], got"):
        convnet_features_backward(shape, theta, x, torch.ones(2, 5, 3), None, None, attended=(0,))
    grad = torch.ones(2, 5, shape.features, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"embedding_grad: expected torch.float32 \[2, 5, .*\], got torch.float64"):
        convnet_features_backward(shape, theta, x, None, None, grad)
