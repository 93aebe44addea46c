"""The ConvNet step against autograd, on every instruction set, alone and with many students."""

import os
import subprocess
import sys

import pytest
import torch

from pydistill import _host
from pydistill.ops import ConvNetShape, convnet_gradient, convnet_logits, convnet_tangent
from pydistill.ops.convnet_step import Workspace, tape_bytes


def problem(shape, N, E=1, kind="hard", dtype=torch.float64, own_images=False, own_labels=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    theta = 0.2 * randn(E, shape.numel)
    images = randn(*((E,) if own_images else ()), N, shape.channels, shape.height, shape.width_px)
    lead = ((E,) if own_labels else ()) + (N,)
    if kind == "hard":
        labels = torch.randint(shape.classes, lead, generator=g)
    else:
        labels = randn(*lead, shape.classes)
        labels = 1.3 * labels.softmax(-1) if kind == "probs" else labels  # of any mass, as F.cross_entropy takes them
    return theta, 0.1 * randn(E, shape.numel), images, labels


def relative(actual, truth):
    return ((actual.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


SHAPES = {
    "usual": ConvNetShape(3, 32, 32, (32, 32, 32), 1, 10),
    "odd sizes, padded channels": ConvNetShape(3, 19, 23, (20, 7, 33), 1, 5),
    "one channel": ConvNetShape(1, 28, 28, (16, 16), 3, 10),
    "one block": ConvNetShape(2, 6, 5, (9,), 1, 3),
    "many classes": ConvNetShape(3, 8, 8, (40,), 1, 70),
    "unpadded": ConvNetShape(4, 12, 12, (8, 8), 0, 2),
    "deep": ConvNetShape(3, 64, 64, (4,) * 6, 1, 2),
}

CASES = [
    ("usual", 7, {}),
    ("odd sizes, padded channels", 6, {"E": 2, "kind": "probs"}),
    ("odd sizes, padded channels", 6, {"E": 3, "own_images": True, "own_labels": True}),
    ("one channel", 5, {"kind": "logits"}),
    ("one block", 3, {"E": 3, "kind": "probs", "own_labels": True}),
    ("many classes", 4, {"kind": "logits", "E": 2, "own_images": True}),
    ("unpadded", 9, {}),
    ("deep", 2, {}),
    ("usual", 1, {}),
    ("one block", 40, {"E": 5}),
    ("one channel", 130, {}),
]


@pytest.mark.parametrize(("name", "N", "options"), CASES)
def test_equals_autograd(name, N, options):
    shape, kind = SHAPES[name], options.get("kind", "hard")
    theta, direction, images, labels = problem(shape, N, **options)
    truth = convnet_logits(shape, theta, images, backend="reference")
    assert relative(convnet_logits(shape, theta, images), truth) < 1e-12
    truth = convnet_gradient(shape, theta, images, labels, label_kind=kind, backend="reference")
    actual = convnet_gradient(shape, theta, images, labels, label_kind=kind)
    assert [relative(a, t) < 1e-12 for a, t in zip(actual, truth, strict=True)] == [True, True]
    truth = convnet_tangent(shape, theta, direction, images, labels, label_kind=kind, backend="reference")
    actual = convnet_tangent(shape, theta, direction, images, labels, label_kind=kind)
    check_tangent(actual, truth, 1e-11)


def test_every_parameter_equals_autograd():
    """Norms hide small parameters: each gets its own comparison, against the largest gradient of its layer."""
    shape = SHAPES["usual"]
    theta, direction, images, labels = problem(shape, 7)
    truth = convnet_tangent(shape, theta, direction, images, labels, backend="reference")[1]
    actual = convnet_tangent(shape, theta, direction, images, labels)[1]
    for i, (a, t) in enumerate(zip(shape.slices(actual), shape.slices(truth), strict=True)):
        if i % 4 == 1 and i < 12:  # a convolution's bias: the norm subtracts it
            assert not a.any()
            assert t.abs().max() < 1e-12
        else:
            assert (a - t).abs().max() < 1e-11 * t.abs().max()


def check_tangent(actual, truth, bound):
    for what, a, t in zip(("slope", "curvature", "images", "labels"), actual, truth, strict=True):
        if t is None:
            assert a is None, what
            continue
        assert a.shape == t.shape, what
        assert relative(a, t) < bound, what


def check_tape(shape):
    """A tape changes no bit of the gradient and the tangent."""
    for dtype in (torch.float64, torch.float32):
        theta, direction, images, labels = problem(shape, 9, E=2, dtype=dtype)
        tape = torch.empty(tape_bytes(shape, 2, 9, dtype), dtype=torch.uint8)
        plain = convnet_gradient(shape, theta, images, labels)
        taped = convnet_gradient(shape, theta, images, labels, tape=tape)
        assert all(torch.equal(a, b) for a, b in zip(plain, taped, strict=True))
        plain = convnet_tangent(shape, theta, direction, images, labels)
        taped = convnet_tangent(shape, theta, direction, images, labels, tape=tape)
        assert all(a is b or torch.equal(a, b) for a, b in zip(plain, taped, strict=True))


def test_tape_changes_no_bit():
    check_tape(SHAPES["odd sizes, padded channels"])


def test_tape_is_kept_in_bf16():
    shape = ConvNetShape(3, 32, 32, (64, 64, 64), 1, 10)
    theta, direction, images, labels = problem(shape, 9, E=2, dtype=torch.float32)
    size = tape_bytes(shape, 2, 9, torch.float32, "bf16")
    assert size < 0.51 * tape_bytes(shape, 2, 9, torch.float32)
    tape = torch.empty(size, dtype=torch.uint8)
    plain = convnet_gradient(shape, theta, images, labels, precision="bf16")
    taped = convnet_gradient(shape, theta, images, labels, precision="bf16", tape=tape)
    assert all(torch.equal(a, b) for a, b in zip(plain, taped, strict=True))
    truth = convnet_tangent(shape, theta, direction, images, labels)
    plain = convnet_tangent(shape, theta, direction, images, labels, precision="bf16")
    taped = convnet_tangent(shape, theta, direction, images, labels, precision="bf16", tape=tape)
    for p, t, exact in zip(plain[:3], taped[:3], truth[:3], strict=True):
        assert not torch.equal(p, t)
        assert cosine(t, exact) > 0.998
        assert cosine(t, p) > 0.999


def test_without_curvature():
    shape = SHAPES["usual"]
    theta, direction, images, labels = problem(shape, 7, E=2)
    slope, curvature, images_grad, _ = convnet_tangent(shape, theta, direction, images, labels)
    short = convnet_tangent(shape, theta, direction, images, labels, curvature=False)
    assert short[1] is None
    assert curvature is not None
    assert torch.equal(short[0], slope)
    assert torch.equal(short[2], images_grad)


def test_without_curvature_by_reference():
    theta, direction, images, labels = problem(SHAPES["one block"], 3)
    found = convnet_tangent(SHAPES["one block"], theta, direction, images, labels, curvature=False, backend="reference")
    assert found[1] is None


def test_default_device_does_not_matter():
    """Working memory is where the kernel runs, not where `torch.set_default_device` points."""
    shape = ConvNetShape(2, 7, 7, (5,), 1, 3)  # of no other test: sizes are kept from call to call
    theta, direction, images, labels = problem(shape, 4)
    with torch.device("meta"):
        found = convnet_tangent(shape, theta, direction, images, labels)
    assert torch.equal(found[1], convnet_tangent(shape, theta, direction, images, labels)[1])


def test_workspace_serves_any_shape():
    """Also for one that it has served before, with whatever the others left in it."""
    workspace = Workspace()
    for _ in range(2):
        for name in ("one block", "usual", "one channel"):
            theta, direction, images, labels = problem(SHAPES[name], 5, E=2)
            fresh = convnet_tangent(SHAPES[name], theta, direction, images, labels)
            reused = convnet_tangent(SHAPES[name], theta, direction, images, labels, workspace=workspace)
            assert all(a is b or torch.equal(a, b) for a, b in zip(fresh, reused, strict=True))


def test_a_workspace_leaves_its_memory_to_the_next():
    def block(workspace, size):
        return workspace.at_least(size).data_ptr()

    first, second = Workspace(), Workspace()
    large, small = block(first, 1 << 20), block(second, 1 << 10)
    assert large != small
    del first, second  # in any order, the larger one stays
    third, fourth = Workspace(), Workspace()
    assert block(third, 1 << 18) == large
    assert block(fourth, 1 << 18) != large
    assert len(fourth.at_least(1 << 21)) >= 1 << 21
    huge = Workspace()
    kept, Workspace.KEPT = Workspace.KEPT, 1 << 10
    try:
        huge.at_least(1 << 22)
        del huge
    finally:
        Workspace.KEPT = kept
    assert not Workspace._idle  # too large to stay


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_bits_over_threads(precision):
    shape = SHAPES["odd sizes, padded channels"]
    theta, direction, images, labels = problem(shape, 40, E=2, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(convnet_tangent(shape, theta, direction, images, labels, precision=precision))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_fp32_is_as_close_as_torch():
    """At fixed theta, to float64: at most three times as far as autograd in float32, whose convolutions are direct.

    Almost all of either distance is units within rounding of the ReLU's kink, which fall on its other side.
    """
    shape = ConvNetShape(3, 32, 32, (64, 64, 64), 1, 10)
    theta, direction, images, labels = problem(shape, 20)
    truth = convnet_tangent(shape, theta, direction, images, labels)
    single = [t.float() if t.is_floating_point() else t for t in (theta, direction, images, labels)]
    ours = convnet_tangent(shape, *single)
    theirs = convnet_tangent(shape, *single, backend="reference")
    for a, b, t in zip(ours[:3], theirs[:3], truth[:3], strict=True):
        assert relative(a, t) <= 3 * relative(b, t) + 1e-6
        assert relative(a, t) < 0.01


@pytest.mark.parametrize("N", [4, 50])
def test_bf16_is_close_to_fp32(N):
    shape = ConvNetShape(3, 32, 32, (64, 64, 64), 1, 10)
    theta, direction, images, labels = problem(shape, N, dtype=torch.float32)
    truth = convnet_gradient(shape, theta, images, labels)
    half = convnet_gradient(shape, theta, images, labels, precision="bf16")
    assert not torch.equal(half[1], truth[1])  # the arithmetic differs
    assert cosine(half[1], truth[1]) > 0.999
    truth = convnet_tangent(shape, theta, direction, images, labels)
    half = convnet_tangent(shape, theta, direction, images, labels, precision="bf16")
    assert [cosine(a, b) > 0.998 for a, b in zip(half[1:3], truth[1:3], strict=True)] == [True, True]


@pytest.mark.parametrize("name", ["usual", "odd sizes, padded channels", "one block", "one channel"])
def test_bf16_of_every_shape(name):
    """Channels, tiles and taps that fill no whole pairs, vectors or matrix tiles; 11 images leave a chunk unfilled."""
    theta, direction, images, labels = problem(SHAPES[name], 11, E=2, dtype=torch.float32)
    truth = convnet_gradient(SHAPES[name], theta, images, labels)
    half = convnet_gradient(SHAPES[name], theta, images, labels, precision="bf16")
    assert relative(half[0], truth[0]) < 1e-3
    assert cosine(half[1], truth[1]) > 0.999
    truth = convnet_tangent(SHAPES[name], theta, direction, images, labels)
    half = convnet_tangent(SHAPES[name], theta, direction, images, labels, precision="bf16")
    assert relative(half[0], truth[0]) < 0.02
    assert [cosine(a, b) > 0.998 for a, b in zip(half[1:3], truth[1:3], strict=True)] == [True, True]


ISA_SCRIPT = """
import torch
from pydistill import _host
from tests.ops.test_convnet_step import SHAPES, problem
from pydistill.ops import convnet_gradient, convnet_tangent
found = []
for name in ("usual", "odd sizes, padded channels"):
    for dtype, precision in ((torch.float64, "fp32"), (torch.float32, "fp32"), (torch.float32, "bf16")):
        theta, direction, images, labels = problem(SHAPES[name], 11, E=2, dtype=dtype)
        found += convnet_gradient(SHAPES[name], theta, images, labels, precision=precision)
        found += convnet_tangent(SHAPES[name], theta, direction, images, labels, precision=precision)[:3]
import sys
torch.save([_host.isa(), *found], sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    """Each that this machine has; bf16 on matrix tiles or in pairs against bf16 emulated by rounding."""
    names = ("avx2", "avx512", "avx512_bf16", "amx")
    assert _host.isa() in names, "no instruction set beyond the baseline, which has no steps on x86"
    results = {}
    for isa in names[: names.index(_host.isa()) + 1]:
        path = tmp_path / isa
        env = {**os.environ, "PYDISTILL_ISA": isa}
        subprocess.run([sys.executable, "-c", ISA_SCRIPT, str(path)], check=True, env=env, timeout=300)
        name, *results[isa] = torch.load(path)
        assert name == isa
    avx2 = results.pop("avx2")
    for isa, found in results.items():
        for i, (a, b) in enumerate(zip(found, avx2, strict=True)):
            # five results each of float64, float32 and bf16, where other roundings turn a few units
            bound = (1e-12, 2e-3, 2e-2)[i // 5 % 3]
            assert relative(a, b) < bound, (isa, i)


def test_non_finite_input_shows():
    shape = SHAPES["usual"]
    theta, _direction, images, labels = problem(shape, 6, dtype=torch.float32)
    images[2, 0, 3, 3] = float("nan")
    logits = convnet_logits(shape, theta, images)[0]
    assert logits.isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert convnet_gradient(shape, theta, images, labels)[0].isnan().all()
    theta[0, 0] = float("inf")
    assert not convnet_logits(shape, theta, images).isfinite().any()


BAD = [
    ({"theta": lambda t: t[:, :-1]}, ValueError, r"theta: expected \[E, \d+\] for this net, got \[1, \d+\]"),
    ({"theta": lambda t: t.half()}, TypeError, "theta: expected float32 or float64, got torch.float16"),
    ({"images": lambda x: x[:, :2]}, ValueError, r"images: expected \[N, \*\(3, 32, 32\)\]"),
    ({"images": lambda x: x.float()}, TypeError, "images: expected dtype torch.float64 as theta, got torch.float32"),
    ({"images": lambda x: x[:0]}, ValueError, r"images: expected .* got \[0, 3, 32, 32\]"),
    ({"images": lambda x: x.to("meta")}, ValueError, "images: expected device cpu as theta, got meta"),
    ({"labels": lambda y: y[:-1]}, ValueError, r"labels: expected shape \[4\] or \[1, 4\], got \[3\]"),
    ({"labels": lambda y: y.float()}, TypeError, "labels: expected torch.int64 for label_kind='hard'"),
    ({"labels": lambda y: y + 10}, RuntimeError, r"labels: expected class numbers in 0\.\.9, got 1"),
    ({"label_kind": lambda _: "soft"}, ValueError, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
    (
        {"precision": lambda _: "fp16"},
        ValueError,
        "precision: expected 'auto', .* or 'tf32-matmul', got 'fp16'",
    ),
    ({"precision": lambda _: "bf16"}, TypeError, "precision: expected float32 images and parameters for 'bf16'"),
    ({"backend": lambda _: "cuda"}, NotImplementedError, "convnet_step: backend='cuda' cannot run on cpu tensors"),
    ({"backend": lambda _: "triton"}, NotImplementedError, "convnet_step has no triton kernel"),
    ({"theta": lambda t: t.clone().requires_grad_()}, RuntimeError, "not differentiable by autograd"),
    (
        {"backend": lambda _: "reference", "tape": lambda _: torch.empty(5, dtype=torch.uint8)},
        NotImplementedError,
        "convnet_step: backend='reference' keeps no tape",
    ),
    (
        {
            "backend": lambda _: "reference",
            "precision": lambda _: "bf16",
            "theta": torch.Tensor.float,
            "images": torch.Tensor.float,
        },
        NotImplementedError,
        "convnet_step: backend='reference' has no precision='bf16'",
    ),
    (
        {"precision": lambda _: "tf32", "theta": torch.Tensor.float, "images": torch.Tensor.float},
        ValueError,
        "precision: expected 'ieee' or 'bf16' on cpu, got 'tf32'",
    ),
    ({"tape": lambda _: torch.empty(5, dtype=torch.uint8)}, RuntimeError, r"tape: expected uint8 \[\d+\]"),
    ({"tape": lambda _: []}, TypeError, "tape: expected a uint8 tensor for backend='cpu', got a list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    shape = SHAPES["usual"]
    theta, _, images, labels = problem(shape, 4)
    given = {"theta": theta, "images": images, "labels": labels}
    for name, value in change.items():
        given[name] = value(given.get(name))
    with pytest.raises(error, match=message):
        convnet_gradient(shape, given.pop("theta"), given.pop("images"), given.pop("labels"), **given)


def test_bad_direction():
    shape = SHAPES["one block"]
    theta, direction, images, labels = problem(shape, 4)
    with pytest.raises(ValueError, match=r"direction: expected torch.float64 \[1, \d+\] on cpu as theta, got"):
        convnet_tangent(shape, theta, direction[:, 1:], images, labels)
