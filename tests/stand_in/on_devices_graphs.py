"""Graphs of the student engine's steps: captured once for a process, shared by nobody at the same time.

Not collected by itself: `test_stand_in.py` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pydistill
from pydistill.augment import DiffAugment
from pydistill.matching import class_gradients
from pydistill.nn import ConvNet
from pydistill.ops import _convnet_step_graph as graph
from pydistill.ops.convnet_step import Workspace, convnet_gradient, convnet_tangent
from pydistill.reference.convnet_shape import ConvNetShape
from pydistill.trajectory import release_graphs, train_students
from tests.stand_in.counts import counts

CLASSES, SIDE = 3, 8


@pytest.fixture(autouse=True)
def _none_yet() -> Iterator[None]:
    release_graphs()
    yield
    release_graphs()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def net(width: int = 4) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(2, CLASSES, width=width, depth=2, image_size=SIDE).cuda()


class Unrolled:
    """An unroll and its gradients, to be had one after the other."""

    def __init__(self, seed: int = 0, students: int = 1, width: int = 4, **options: Any) -> None:
        module = net(width)
        P = sum(p.numel() for p in module.parameters())
        self.theta0 = (0.3 * drawn(students, P, seed=seed)).cuda()
        self.images = drawn(6, 2, SIDE, SIDE, seed=seed).cuda().requires_grad_()
        self.lr = torch.tensor(0.05, device="cuda", requires_grad=True)
        labels = torch.arange(6, device="cuda") % CLASSES
        options = {"steps": 3, "generator": torch.Generator().manual_seed(seed), **options}
        self.theta = pydistill.unroll(module, self.theta0, self.images, labels, self.lr, **options)

    def gradients(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.theta.square().sum(), [self.images, self.lr]))

    def all(self) -> list[Tensor]:
        return [self.theta.detach(), *self.gradients()]


def trained(**options: Any) -> list[Tensor]:
    theta0 = torch.cat([p.detach().flatten() for p in net().parameters()])[None]
    images, labels = drawn(7, 2, SIDE, SIDE).cuda(), torch.arange(7, device="cuda") % CLASSES
    generator = torch.Generator().manual_seed(1)
    options = {"epochs": 2, "lr": 0.1, "batch_size": 4, "generator": generator, **options}
    return [train_students(net(), theta0, images, labels, **options).theta]


def of_classes(labels: list[int]) -> list[Tensor]:
    module = net()
    theta = torch.cat([p.detach().flatten() for p in module.parameters()])
    images = drawn(6, 2, SIDE, SIDE).cuda().requires_grad_()
    found = class_gradients(module, theta, images, torch.tensor(labels).cuda())
    return [found.detach(), *torch.autograd.grad(found.square().sum(), images)]


CALLS: dict[str, tuple[Callable[[], list[Tensor]], int]] = {  # with the captures of the first
    "unroll": (lambda: Unrolled().all(), 2),
    "unroll, first order": (lambda: Unrolled(mode="first_order").all(), 2),
    "unroll, ragged": (lambda: Unrolled(batch_size=4).all(), 4),
    "unroll, ragged, several": (lambda: Unrolled(students=2, batch_size=4).all(), 4),
    "unroll, augmented": (lambda: Unrolled(augment=DiffAugment("color_crop_flip")).all(), 2),
    "unroll, bf16": (lambda: Unrolled(precision="bf16").all(), 2),
    "unroll, tf32": (lambda: Unrolled(precision="tf32").all(), 2),
    "unroll, recomputed": (lambda: Unrolled(store_every=2).all(), 3),
    "unroll, nothing kept": (lambda: Unrolled(memory=1 << 12).all(), 2),
    "train_students": (trained, 2),
    "train_students, augmented": (lambda: trained(augment=DiffAugment("color_crop_flip")), 2),
    "class_gradients": (lambda: of_classes([0, 0, 1, 1, 2, 2]), 2),
    "class_gradients, ragged": (lambda: of_classes([0, 1, 1, 2, 2, 2]), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_graphs_are_captured_once(name: str) -> None:
    call, first = CALLS[name]
    found = []
    for _ in range(3):
        with counts() as c:
            values = call()
        values = [value.cpu() for value in values]
        found.append((c.captures, c.allocations, c.launches, torch.cuda.memory_reserved(), values))
    assert [captures for captures, *_ in found] == [first, 0, 0]
    assert found[1][1:4] == found[2][1:4]
    for values in (found[1][-1], found[2][-1]):
        assert all(map(torch.equal, found[0][-1], values))


def test_results_are_not_the_buffers_of_the_next_call() -> None:
    shape = ConvNetShape(2, SIDE, SIDE, (4, 4), 1, CLASSES)
    labels = torch.arange(6, device="cuda") % CLASSES
    kept = []
    for seed in range(3):
        theta, images = drawn(2, shape.numel, seed=seed).cuda(), drawn(6, 2, SIDE, SIDE, seed=seed).cuda()
        for function, given in ((convnet_gradient, ()), (convnet_tangent, (theta.flip(1),))):
            arguments = (shape, theta, *given, images, labels)
            kept.append((function(*arguments, workspace=Workspace()), function(*arguments)))
    for replayed, direct in kept:  # all at the end
        for there, here in zip(replayed, direct, strict=True):
            assert torch.equal(there, here) if here is not None else there is None


def test_a_tape_is_a_list() -> None:
    shape = ConvNetShape(2, SIDE, SIDE, (4, 4), 1, CLASSES)
    theta, images = drawn(2, shape.numel).cuda(), drawn(6, 2, SIDE, SIDE).cuda()
    batch, tape = (images, torch.arange(6, device="cuda") % CLASSES), []
    assert all(
        map(torch.equal, convnet_gradient(shape, theta, *batch, tape=tape), convnet_gradient(shape, theta, *batch))
    )
    arguments = (shape, theta, theta.flip(1), *batch)
    *want, nothing = convnet_tangent(*arguments)
    assert nothing is None
    for workspace in (None, Workspace()):
        assert all(map(torch.equal, convnet_tangent(*arguments, tape=tape, workspace=workspace), want))
    with pytest.raises(TypeError, match=r"^tape: expected a list for backend='cuda', got a Tensor"):
        convnet_gradient(shape, theta, *batch, tape=theta)


def test_calls_in_flight_do_not_share_their_buffers() -> None:
    want = [Unrolled(seed).all() for seed in range(3)]
    calls = [Unrolled(seed) for seed in range(3)]  # forward passes, with no backward pass yet
    kept = [call.theta.detach().clone() for call in calls]
    gradients = [call.gradients() for call in reversed(calls)][::-1]
    for call, theta, found, (wanted, *rest) in zip(calls, kept, gradients, want, strict=True):
        assert torch.equal(call.theta, theta)  # as it was before the others ran
        assert torch.equal(theta, wanted)
        assert all(map(torch.equal, found, rest))


def test_a_call_within_a_step_of_another() -> None:
    inner = []

    def augment(images: Tensor) -> Tensor:
        with torch.enable_grad():
            inner.append(Unrolled(4).all())
        return images * 1.5

    outer = Unrolled(augment=augment).all()
    alone = Unrolled(augment=lambda images: images * 1.5).all()
    assert all(map(torch.equal, outer, alone))
    assert len(inner) == 6  # forward and back
    for found in inner:
        assert all(map(torch.equal, found, Unrolled(4).all()))


def test_threads_that_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    want, found, replay = [Unrolled(seed).all() for seed in range(2)], {}, torch.cuda.CUDAGraph.replay

    def slow(self: Any) -> None:
        time.sleep(0.005)  # others have time to write to this graph's buffers
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", slow)

    def run(seed: int) -> None:
        found[seed] = Unrolled(seed).all()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert all(map(torch.equal, found[seed], want[seed]))


def test_each_stream_has_graphs_of_its_own() -> None:
    want = Unrolled().all()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for captures in (2, 0):
        for stream in streams:
            with torch.cuda.stream(stream), counts() as c:
                assert all(map(torch.equal, Unrolled().all(), want))
            assert c.captures == captures
    buffers = [
        {t.data_ptr() for t in (*step.inputs, *step.outputs) if t is not None} for step in graph._recent.values()
    ]
    assert len(buffers) == 6
    assert len(set().union(*buffers)) == sum(map(len, buffers))


def test_the_least_recently_used_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST", 3)
    Unrolled(width=4), Unrolled(width=5), Unrolled(width=6)
    Unrolled(width=4)
    Unrolled(width=7)
    for width, captures in ((7, 0), (4, 0), (6, 0), (5, 1)):
        with counts() as c:
            Unrolled(width=width)
        assert c.captures == captures
    assert len(graph._recent) == 3


@pytest.mark.parametrize(("bound", "kept"), [("MOST", 1), ("KEPT", 2)])
def test_a_call_keeps_its_graphs_though_it_needs_more_than_the_process_keeps(
    bound: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, bound, {"MOST": 1, "KEPT": 0}[bound])
    with counts() as c:
        Unrolled(steps=9, batch_size=4)  # 4, 2, 4, 2, ... images
    assert c.captures == 2
    assert len(graph._recent) == kept


def test_a_step_and_its_tangent_are_kept_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "KEPT", 0)
    for captures in (2, 0):
        with counts() as c:
            Unrolled().gradients()
        assert c.captures == captures


def test_what_graphs_reserve_is_counted() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    shape, images = ConvNetShape(2, SIDE, SIDE, (16, 16), 1, CLASSES), drawn(64, 2, SIDE, SIDE).cuda()
    theta, labels = drawn(1, shape.numel).cuda(), torch.arange(64, device="cuda") % CLASSES
    loss, grad = convnet_gradient(shape, theta, images, labels, workspace=Workspace())
    own = sum(t.nbytes for t in (theta, images, labels, loss, grad))
    taken = torch.cuda.memory_allocated() - before - own  # here a pool is not used twice
    assert taken > 4 * own  # most of it is neither an input nor a result
    assert abs(graph._nbytes(theta.device) - taken) < 0.05 * taken


@pytest.mark.parametrize("bound", [0, 1 << 40])
def test_a_pool_that_is_too_large_ends_with_the_call_that_needs_it(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_bound", lambda device: bound)
    Unrolled(width=16, batch_size=4).all()
    (large,) = {step.pool for step in graph._recent.values()}
    assert len(graph._recent) == 4  # of one call, ragged
    Unrolled(width=3, batch_size=4).all()
    pools = {step.pool for step in graph._recent.values()}
    assert len(pools) == 1
    assert (len(graph._recent), pools == {large}) == ((8, True) if bound else (4, False))


def test_released_graphs_free_their_memory() -> None:
    release_graphs()
    gc.collect()  # what earlier tests left in circles
    before = torch.cuda.memory_allocated()
    call = Unrolled()
    theta = call.theta.detach().clone()
    with_graphs = torch.cuda.memory_allocated()
    release_graphs()
    assert torch.equal(Unrolled().theta, theta)  # captured anew
    release_graphs()
    del call, theta
    assert with_graphs > before
    assert torch.cuda.memory_allocated() == before


def test_what_waits_for_its_backward_pass_outlives_a_release() -> None:
    want = Unrolled().all()
    call = Unrolled()
    release_graphs()
    assert all(map(torch.equal, call.all(), want))


def test_graphs_hold_nothing_of_the_mode_they_were_captured_in() -> None:
    shape = ConvNetShape(2, SIDE, SIDE, (4, 4), 1, CLASSES)
    theta, images = drawn(1, shape.numel).cuda(), drawn(6, 2, SIDE, SIDE).cuda()
    labels = torch.arange(6, device="cuda") % CLASSES
    want = convnet_gradient(shape, theta, images, labels)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        inside = convnet_gradient(shape, theta, images, labels, workspace=Workspace())
    outside = convnet_gradient(shape, theta, images, labels, workspace=Workspace())
    assert len(graph._recent) == 1
    assert all(map(torch.equal, inside, want))
    assert all(map(torch.equal, outside, want))


class _Added(TorchDispatchMode):
    """Refuses sums whose order a GPU does not fix."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.index_add_.default, torch.ops.aten.index_add.default):
            index = args[2].tolist()
            assert len(index) == len(set(index)), "index_add_ with a row twice"
        return function(*args, **(kwargs or {}))


BATCHES = {
    "drawn": {"batch_size": 4},
    "drawn for several": {"batch_size": 4, "students": 2},
    "given": {"batches": torch.tensor([[0, 1, 1, 5], [2, 2, 2, 0], [5, 4, 3, 2]])},
    "given for each": {"batches": torch.tensor([[[0, 1, 1], [2, 2, 0]]] * 3), "students": 2},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_the_order_of_sums_is_fixed(name: str, own: bool) -> None:
    options = dict(BATCHES[name])
    students, given = options.pop("students", 1), options.pop("batches", None)
    found = []
    for device in ("cuda", "cpu"):
        module = net().to(device)
        P = sum(p.numel() for p in module.parameters())
        theta0 = (0.3 * drawn(students, P)).to(device)
        images = drawn(*(students,) * own, 6, 2, SIDE, SIDE).to(device).requires_grad_()
        labels = (torch.arange(6, device=device) % CLASSES).expand(*(students,) * own, 6)
        batches = None if given is None else [index.to(device) for index in given]
        generator = torch.Generator().manual_seed(1)
        with _Added() if device == "cuda" else contextlib.nullcontext():
            theta = pydistill.unroll(
                module, theta0, images, labels, 0.05, steps=3, batches=batches, generator=generator, **options
            )
            found.append(torch.autograd.grad(theta.square().sum(), images)[0].cpu())
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()
