"""The matching loss against the repositories' lines, and class gradients against autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pydistill.matching import class_gradients, gradient_match
from pydistill.nn import ConvNet
from pydistill.ops.convnet_step import Workspace
from pydistill.trajectory import FlatModule, students


def literal_match(real, syn, kind):
    """The code's three distances, written out."""
    if kind == "mse":
        return sum((r - s).square().sum() for r, s in zip(real, syn, strict=True))
    if kind == "cos":
        r, s = (torch.cat([g.flatten() for g in side]) for side in (real, syn))
        return 1 - (r * s).sum() / (r.norm() * s.norm() + 1e-6)
    total = 0
    for r, s in zip(real, syn, strict=True):
        if r.dim() > 1:
            r, s = r.flatten(1), s.flatten(1)
            total = total + (1 - (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + 1e-6)).sum()
    return total


def distance(real, syn, **options):
    return gradient_match(grads_real=real, grads_syn=syn, **options)


SHAPES = [(4, 3, 3, 3), (4,), (4,), (4,), (5, 70), (5,), (2, 3, 1)]
KINDS = ("row_cos", "cos", "mse")


def gradients(*lead, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def side():
        return [
            torch.randn(*lead, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in SHAPES
        ]

    return side(), side()


def flattened(side, K=None):
    return torch.cat([g.reshape(*(() if K is None else (K,)), -1) for g in side], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_two_derivatives_are_the_codes(kind):
    syn, real = gradients()
    leaves = [*syn, *real]
    weights = [torch.randn_like(leaf) for leaf in leaves]

    def orders(loss):
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        total = sum((g * w).sum() for g, w in zip(first, weights, strict=True))
        return loss, *first, *torch.autograd.grad(total, leaves, materialize_grads=True)

    expected = orders(literal_match(real, syn, kind))
    assert expected[0] > 0.1
    for found in (
        distance(real, syn, kind=kind),
        distance(flattened(real), flattened(syn), kind=kind, shapes=SHAPES),
        distance(flattened(real)[None], flattened(syn)[None], kind=kind, shapes=SHAPES, reduction="none")[0],
    ):
        assert found.shape == ()
        for actual, truth in zip(orders(found), expected, strict=True):
            torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_reductions(kind):
    syn, real = gradients(3)
    each = torch.stack([literal_match([r[k] for r in real], [s[k] for s in syn], kind) for k in range(3)])
    pair = flattened(real, 3), flattened(syn, 3)
    for reduction, truth in (("none", each), ("sum", each.sum()), ("mean", each.mean())):
        torch.testing.assert_close(distance(*pair, kind=kind, shapes=SHAPES, reduction=reduction), truth)
    torch.testing.assert_close(distance(*pair, kind=kind, shapes=SHAPES), each.sum())


def test_float32_and_half_precision():
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        syn, real = gradients(dtype=dtype)
        found = distance(real, syn)
        assert found.dtype == torch.float32
        truth = literal_match([g.detach().double() for g in real], [g.detach().double() for g in syn], "row_cos")
        assert found.item() == pytest.approx(truth.item(), rel=1e-5)  # the inputs are rounded, the sums are not
        assert all(g.dtype == dtype for g in torch.autograd.grad(found, syn))
        wide = literal_match(*([g.double() for g in side] for side in (real, syn)), "row_cos")
        expected = torch.autograd.grad(wide, syn, materialize_grads=True)
        actual = torch.autograd.grad(distance(real, syn), syn)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=rtol, atol=1e-3 * rtol)


@pytest.mark.parametrize("kind", ["row_cos", "cos"])
def test_rows_that_are_zero_have_distance_one_and_no_gradient(kind):
    """Filters that no image reaches have gradients of exact zeros; their norm must not make a NaN of its derivative."""
    real, syn = torch.randn(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64).requires_grad_()
    loss = distance([real], [syn], kind=kind)
    assert loss.item() == (2 if kind == "row_cos" else 1)
    (grad,) = torch.autograd.grad(loss, syn, create_graph=True)
    (expected,) = torch.autograd.grad(literal_match([real], [syn], kind), syn)
    torch.testing.assert_close(grad, expected)
    (second,) = torch.autograd.grad(grad.sum(), syn)
    assert torch.isfinite(second).all()


def test_long_gradients_are_summed_in_pieces():
    generator = torch.Generator().manual_seed(0)
    real, syn = torch.randn(2, 10_000, generator=generator, dtype=torch.float64)
    for kind in ("cos", "mse"):
        for size in (4095, 4096, 4097, 8192, 10_000):
            found = distance([real[:size]], [syn[:size]], kind=kind)
            torch.testing.assert_close(found, literal_match([real[:size]], [syn[:size]], kind))


G = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("syn", "real", "options", "error", "message"),
    [
        ([G], [G], {"kind": "l1"}, ValueError, "kind: expected 'row_cos', 'cos' or 'mse', got 'l1'"),
        ([G], [G], {"reduction": "max"}, ValueError, "reduction: expected 'sum', 'mean' or 'none', got 'max'"),
        ([G, G], [G], {}, ValueError, "grads_syn: expected as many gradients as grads_real.*, got 2 and 1"),
        ([], [], {}, ValueError, "at least one, got 0 and 0"),
        ([G, G], [G, G.T], {}, ValueError, r"grads_syn\[1\]: expected shape \[3, 2\] as grads_real\[1\], got \[2, 3\]"),
        ([G, None], [G, G], {}, TypeError, r"grads_syn\[1\]: expected a tensor, got NoneType"),
        ([G], [G.double()], {}, TypeError, r"grads_syn\[0\]: expected torch.float64 .*, got torch.float32"),
        ([G], G, {}, TypeError, "grads_syn: expected a flat tensor where grads_real is one"),
        ([G], [G], {"shapes": [(2, 3)]}, ValueError, "shapes: expected None for sequences"),
        (G, G, {}, ValueError, "shapes: expected the parameters' shapes for flat gradients, got None"),
        (G, G, {"shapes": [(2, 2)]}, ValueError, r"grads_real: expected \[4\] or \[K, 4\] .*, got \[2, 3\]"),
        (G, G[:1], {"shapes": [(3,)]}, ValueError, r"grads_syn: expected shape \[1, 3\] as grads_real, got \[2, 3\]"),
        (G, G.double(), {"shapes": [(3,)]}, TypeError, "grads_syn: expected torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(syn, real, options, error, message):
    with pytest.raises(error, match=message):
        distance(real, syn, **options)


# ---- the gradients


def make_net(dtype=torch.float64, width=6):
    torch.manual_seed(1)
    return ConvNet(3, 4, width=width, depth=2, image_size=10).to(dtype)


def literal_gradients(net, theta, images, labels, classes):
    flat = FlatModule(net)
    found = []
    for k in classes:
        x, y = images[labels == k], labels[labels == k]
        loss = F.cross_entropy(functional_call(net, flat.unflatten(theta), (x,)), y)
        found.append(torch.autograd.grad(loss, theta, create_graph=True)[0])
    return torch.stack(found)


def relative(actual, truth):
    assert truth.norm() > 1e-8
    return ((actual - truth).norm() / truth.norm()).item()


RAGGED, MIXED = [0, 1, 1, 3, 2, 3, 3, 0, 1], [2, 0, 3, 1, 1, 3, 0, 2]
SORTED = [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("labels", [SORTED, MIXED, RAGGED, [3, 3, 0, 1, 2]], ids=str)
def test_against_autograd_through_the_matching_loss(engine, labels):
    """Value, image gradients of both sides and the parameters' gradient, in float64."""
    net = make_net()
    flat, syn_labels = FlatModule(net), torch.tensor(labels)
    real_labels = torch.tensor(RAGGED).flip(0)
    syn, real = (
        torch.randn(len(y), 3, 10, 10, dtype=torch.float64).requires_grad_() for y in (syn_labels, real_labels)
    )
    theta = flat.parameters().requires_grad_()

    def results(gradients):
        pair = gradients(real, real_labels), gradients(syn, syn_labels)
        loss = distance(*pair, shapes=flat.shapes)
        return pair[1].detach(), loss.detach(), *torch.autograd.grad(loss, (syn, real, theta))

    found = results(lambda x, y: class_gradients(net, theta, x, y, engine=engine))
    truth = results(lambda x, y: literal_gradients(net, theta, x, y, range(4)))
    for actual, expected in zip(found, truth, strict=True):
        assert relative(actual, expected) < 1e-10


def test_some_classes_in_an_order():
    net = make_net()
    theta, labels = FlatModule(net).parameters().requires_grad_(), torch.tensor([3, 1, 3, 1, 3])
    images = torch.randn(5, 3, 10, 10, dtype=torch.float64).requires_grad_()
    truth = literal_gradients(net, theta, images, labels, (3, 1))
    (expected,) = torch.autograd.grad(truth.sin().sum(), images)
    for engine in ("student", "generic"):
        found = class_gradients(net, theta, images, labels, classes=(3, 1), engine=engine)
        assert relative(found, truth) < 1e-10
        assert relative(torch.autograd.grad(found.sin().sum(), images)[0], expected) < 1e-10


@pytest.mark.parametrize(("images_too", "theta_too"), list(itertools.product((False, True), repeat=2)))
def test_what_requires_a_gradient_gets_one(images_too, theta_too):
    net = make_net()
    theta = FlatModule(net).parameters().requires_grad_(theta_too)
    images = torch.randn(8, 3, 10, 10, dtype=torch.float64).requires_grad_(images_too)
    for engine in ("student", "generic"):
        found = class_gradients(net, theta, images, torch.tensor(SORTED), engine=engine)
        assert found.requires_grad == (images_too or theta_too)
        with torch.no_grad():
            assert not class_gradients(net, theta, images, torch.tensor(SORTED), engine=engine).requires_grad
        if images_too or theta_too:
            found.square().sum().backward()
            assert (images.grad is not None) == images_too
            assert (theta.grad is not None) == theta_too
            images.grad = theta.grad = None


def test_the_derivative_starts_from_what_the_gradients_kept(monkeypatch):
    tapes, tangent = [], students.convnet_tangent
    monkeypatch.setattr(
        students, "convnet_tangent", lambda *a, **options: tapes.append(options["tape"]) or tangent(*a, **options)
    )
    net = ConvNet(3, 4, width=8, depth=2, image_size=8)
    images = torch.randn(8, 3, 8, 8, requires_grad=True)
    class_gradients(net, FlatModule(net).parameters().detach(), images, torch.arange(8) % 4).square().sum().backward()
    assert [tape is not None for tape in tapes] == [True]


def test_backward_twice_and_a_workspace_that_serves_many():
    """The first backward uses up what the forward kept; the second computes it again, to the bit."""
    net, workspace = make_net(torch.float32), Workspace()
    theta, images = FlatModule(net).parameters(), torch.randn(8, 3, 10, 10).requires_grad_()
    found = class_gradients(net, theta, images, torch.tensor(SORTED), workspace=workspace)
    fresh = class_gradients(net, theta, images, torch.tensor(SORTED))
    assert torch.equal(found, fresh)
    grads = [torch.autograd.grad(found.sin().sum(), images, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert torch.equal(grads[0], torch.autograd.grad(fresh.sin().sum(), images)[0])


def test_the_second_derivative_of_the_result_raises():
    net = make_net()
    theta, images = FlatModule(net).parameters(), torch.randn(4, 3, 10, 10, dtype=torch.float64).requires_grad_()
    found = class_gradients(net, theta, images, torch.arange(4))
    (first,) = torch.autograd.grad(found.square().sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiable once.*engine='generic' goes further"):
        torch.autograd.grad(first.sum(), images)


def test_bf16_points_the_same_way():
    net = make_net(torch.float32, width=32)
    flat, labels = FlatModule(net), torch.arange(4).repeat_interleave(5)
    real, syn = torch.randn(20, 3, 10, 10), torch.randn(20, 3, 10, 10)

    def image_gradient(precision):
        x = syn.clone().requires_grad_()
        pair = (class_gradients(net, flat.parameters(), each, labels, precision=precision) for each in (real, x))
        loss = distance(*pair, shapes=flat.shapes)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    (loss, exact), (rounded_loss, rounded) = image_gradient("fp32"), image_gradient("bf16")
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.02)
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.99


def test_threads_and_runs_agree_bitwise():
    net = make_net(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            images = torch.randn(9, 3, 10, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
            g = class_gradients(net, FlatModule(net).parameters(), images, torch.tensor(RAGGED))
            found.append((g.detach(), torch.autograd.grad(g.sin().sum(), images)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_nets_run_on_autograd():
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(320, 4)).double().eval()
    )
    theta = FlatModule(net).parameters().requires_grad_()
    images = torch.randn(8, 3, 10, 10, dtype=torch.float64).requires_grad_()
    found = class_gradients(net, theta, images, torch.tensor(MIXED))
    truth = literal_gradients(net, theta, images, torch.tensor(MIXED), range(4))
    pairs = [torch.autograd.grad(g.sin().sum(), (images, theta), retain_graph=True) for g in (found, truth)]
    for actual, expected in zip(*pairs, strict=True):
        assert relative(actual, expected) < 1e-12
    seconds = []
    for g in (found, truth):
        (first,) = torch.autograd.grad(g.sin().sum(), images, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), images, retain_graph=True)[0])
    assert relative(*seconds) < 1e-11
    with pytest.raises(ValueError, match="engine: expected a net that the student engine can run"):
        class_gradients(net, theta, images, torch.tensor(MIXED), engine="student")


IMAGES, LABELS = torch.zeros(4, 3, 10, 10), torch.arange(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"theta": torch.zeros(7)}, ValueError, r"theta: expected shape \[\d+\] for this net, got \[7\]"),
        ({"theta": None}, TypeError, "theta: expected a tensor, got NoneType"),
        ({"images": IMAGES.double()}, TypeError, "images: expected dtype torch.float32 as theta, got torch.float64"),
        ({"images": IMAGES[0]}, ValueError, r"images: expected \[N, C, H, W\] .*, got shape \[3, 10, 10\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "with at least one image"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected int64 class numbers, got torch.float32"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \[4\] as images, got \[3\]"),
        ({"labels": LABELS - 1}, ValueError, "labels: expected class numbers >= 0, got -1"),
        ({"labels": LABELS + 1}, ValueError, "labels: expected at least one image of every class, got none of class 0"),
        ({"num_classes": 3}, ValueError, r"labels: expected class numbers in 0\.\.2, got 3"),
        ({"num_classes": 6}, ValueError, "labels: .* every class, got none of class 4"),
        ({"labels": LABELS + 4, "classes": range(4, 8)}, ValueError, "below the net's 4 classes, got 7"),
        ({"classes": [0, 1, 2]}, ValueError, r"labels: expected one of the classes \[0, 1, 2\], got 3"),
        ({"classes": [0, 1, 1]}, ValueError, r"classes: expected different class numbers >= 0.*, got \[0, 1, 1\]"),
        ({"classes": [0, 5], "num_classes": 4}, ValueError, "classes: expected numbers below num_classes=4, got 5"),
        ({"engine": "fast"}, ValueError, "engine: expected 'auto', 'student', 'compiled' or 'generic', got 'fast'"),
        ({"precision": "fp8"}, ValueError, "precision: expected 'auto', 'ieee', .* or 'tf32-matmul', got 'fp8'"),
    ],
)
def test_wrong_arguments_of_class_gradients_are_named(changes, error, message):
    net = make_net(torch.float32)
    given = {"net": net, "theta": FlatModule(net).parameters(), "images": IMAGES, "labels": LABELS}
    with pytest.raises(error, match=message):
        class_gradients(**given | changes)
