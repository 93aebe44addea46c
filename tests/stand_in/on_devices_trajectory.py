"""Students in training on the devices, and the gradients of what they become, against the CPU.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydistill
from pydistill.augment import DiffAugment
from pydistill.matching import class_gradients, features
from pydistill.nn import ConvNet
from pydistill.ops._convnet_step_graph import StepGraphs
from pydistill.ops._convnet_step_layers import kept_bytes
from pydistill.seeding import seeded_net
from pydistill.trajectory import GSAM, Adam, KeptSteps, convnet_shape, release_graphs, train_students
from pydistill.trajectory.experts import train_experts
from tests.matrices import sample
from tests.stand_in.precisions import CONV, IEEE, MATMUL, TF32, Precisions, switched_to

DEVICES = ("cuda:0", "cuda:1")
CLASSES, SIDE, IMAGES = 3, 8, 6


def convnet() -> nn.Module:
    return ConvNet(2, CLASSES, width=4, depth=2, image_size=SIDE)


def wider() -> nn.Module:
    """Of a size that no other test has, so that its graphs are not there yet."""
    return ConvNet(2, CLASSES, width=7, depth=1, image_size=SIDE)


def batch_normed() -> nn.Module:
    return ConvNet(2, CLASSES, width=4, depth=1, image_size=SIDE, norm="batch")


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def unrolled(device: str, net: Any, students: int, function: str, options: dict[str, Any]) -> list[Tensor]:
    """Outcome and gradients in theta0, images, labels (unless hard) and lr."""
    torch.manual_seed(0)
    net = net().to(device)
    P = sum(p.numel() for p in net.parameters())
    theta0 = (0.3 * drawn(students, P)).squeeze(0).to(device).requires_grad_()
    images = drawn(IMAGES, 2, SIDE, SIDE).to(device).requires_grad_()
    hard = options.get("label_kind", "hard") == "hard"
    labels = torch.arange(IMAGES).to(device) % CLASSES if hard else drawn(IMAGES, CLASSES).to(device).requires_grad_()
    if options.get("label_kind") == "probs":
        labels = labels.detach().softmax(1).requires_grad_()
    lr = torch.tensor(0.05, device=device, requires_grad=True)
    options = {"steps": 3, "batch_size": 4, "generator": torch.Generator().manual_seed(1), **options}
    if function == "unroll":
        out = pydistill.unroll(net, theta0, images, labels, lr, **options)
        loss = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    else:
        loss = pydistill.trajectory_match(net, theta0, theta0.detach() + 0.1, images, labels, lr, **options)
    leaves = [leaf for leaf in (theta0, images, labels, lr) if leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "student": (convnet, 1, {}),
    "student, first order": (convnet, 1, {"mode": "first_order"}),
    "student, several": (convnet, 2, {"batch_size": None}),
    "student, float labels": (convnet, 1, {"label_kind": "logits"}),
    "student, probabilities": (convnet, 1, {"label_kind": "probs"}),
    "student, bf16": (convnet, 1, {"precision": "bf16"}),
    "student, tf32": (convnet, 1, {"precision": "tf32"}),
    "student, momentum": (convnet, 1, {"momentum": 0.9, "weight_decay": 0.01}),
    "student, Adam": (convnet, 1, {"optimizer": Adam(), "store_every": 2}),
    "student, ragged": (convnet, 1, {"batch_size": 5}),
    "student, warmup": (convnet, 1, {"warmup": 1, "at": (2, 3)}),
    "student, augmented": (convnet, 1, {"augment": DiffAugment("color_crop_cutout_flip_scale_rotate")}),
    "student, stored on the host": (convnet, 1, {"store": "host"}),
    "generic": (convnet, 1, {"engine": "generic"}),
    "generic, first order": (convnet, 2, {"engine": "generic", "mode": "first_order"}),
    "generic, bf16": (convnet, 1, {"engine": "generic", "precision": "bf16"}),
    "generic, augmented": (convnet, 1, {"engine": "generic", "augment": DiffAugment("color_crop_flip")}),
    "generic, buffers": (batch_normed, 1, {}),
    "full": (convnet, 1, {"mode": "full"}),
}
MATRIX = [(name, function, device) for name in CASES for function in ("unroll", "match") for device in DEVICES]
FIRST = [
    case
    for number, case in enumerate(MATRIX)
    if (case[0].startswith("student") and case[1] == "match" and case[2] == "cuda:0")
    or (case[2] == "cuda:1" and number % 4 == 3)
]


@pytest.mark.parametrize(("name", "function", "device"), sample(MATRIX, FIRST))
def test_unrolled_students(name: str, function: str, device: str) -> None:
    net, students, options = CASES[name]
    if function == "match":
        options = {key: value for key, value in options.items() if key != "at"}
    want = unrolled("cpu", net, students, function, {**options, "precision": on_cpu(options)})
    got = unrolled(device, net, students, function, options)
    assert_equal(got, want, device, 0.05 if "bf16" in name else 1e-4)


def on_cpu(options: dict[str, Any]) -> str:
    precision = options.get("precision", "fp32")
    return "fp32" if precision == "tf32" else precision


def assert_equal(got: list[Tensor], want: list[Tensor], device: str, bound: float = 1e-4) -> None:
    for there, here in zip(got, want, strict=True):
        assert there.device == torch.device(device)
        assert there.dtype == here.dtype
        here = here.cpu().double()
        assert (there.cpu().double() - here).norm() <= bound * here.norm() + 1e-7


@pytest.mark.parametrize("device", DEVICES)
def test_random_layers_are_replayed_with_their_numbers(device: str) -> None:
    exact = unrolled(device, with_dropout, 1, "unroll", {})
    assert_equal(exact, unrolled(device, with_dropout, 1, "unroll", {"mode": "full"}), device)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_of_a_side_stream(device: str) -> None:
    with torch.cuda.stream(torch.cuda.Stream(device)):
        got = unrolled(device, convnet, 1, "unroll", {})
    assert_equal(got, unrolled("cpu", convnet, 1, "unroll", {}), device)


ASKED = [  # what is asked for, torch's switches, and what is computed
    *((options, switches, switches) for options in ({}, {"precision": "auto"}) for switches in (TF32, CONV, MATMUL)),
    *(({"precision": name}, TF32, IEEE) for name in ("ieee", "fp32", "bf16")),
    *(({"precision": name}, IEEE, wanted) for name, wanted in (("tf32", TF32), ("tf32-conv", CONV))),
    ({"precision": "tf32-matmul"}, CONV, MATMUL),
]


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize(("options", "switches", "wanted"), ASKED)
def test_the_precision_is_that_of_the_call_in_the_backward_pass_too(
    options: dict[str, Any],
    switches: tuple[str, str],
    wanted: tuple[str, str],
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release_graphs()
    module = convnet().cuda()
    theta0 = 0.3 * drawn(sum(p.numel() for p in module.parameters())).cuda()
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda().requires_grad_(), torch.arange(IMAGES, device="cuda") % CLASSES
    with Precisions(monkeypatch) as found:
        with switched_to(*switches):
            kept = {} if engine == "generic" else {"store_every": 2}  # with steps that are run again
            theta = pydistill.unroll(module, theta0, images, labels, 0.1, steps=3, engine=engine, **kept, **options)
        forward, found.seen = found.seen, set()
        with switched_to(*(TF32 if wanted == IEEE else IEEE)):
            torch.autograd.grad(theta.square().sum(), images)
    assert forward == found.seen == {wanted}


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_the_precision_of_other_calls_is_what_torch_is_set_to(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = convnet().cuda()
    theta = 0.3 * drawn(sum(p.numel() for p in module.parameters())).cuda().requires_grad_()
    batch = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    with Precisions(monkeypatch) as found:
        with switched_to(*MATMUL):
            train_students(module, theta.detach()[None], *batch, epochs=1, lr=0.1, engine=engine)
            rows = class_gradients(module, theta, *batch, engine=engine)
        with switched_to(*(IEEE if engine == "student" else MATMUL)):
            torch.autograd.grad(rows.square().sum(), theta)
    assert found.seen == {MATMUL}


def test_plain_autograd_has_no_precision_of_its_own() -> None:
    module = convnet().cuda()
    theta = 0.3 * drawn(sum(p.numel() for p in module.parameters())).cuda()
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    calls = {
        "mode='full'": lambda **o: pydistill.unroll(module, theta, images, labels, 0.1, steps=1, mode="full", **o),
        "the compiled engine": lambda **o: pydistill.unroll(
            module, theta, images, labels, 0.1, steps=1, engine="compiled", **o
        ),
        "gradients by autograd": lambda **o: class_gradients(module, theta, images, labels, engine="generic", **o),
        "features by autograd": lambda **o: features(module, theta, images, **o),
    }
    with switched_to(*CONV):
        for name, call in calls.items():
            if name != "the compiled engine":  # takes long
                for precision in ("auto", "tf32-conv", "bf16"):
                    call(precision=precision)
            for precision in ("ieee", "tf32"):
                with pytest.raises(
                    ValueError, match=f"^precision: expected 'tf32-conv', .* which {name} follow.*, got"
                ):
                    call(precision=precision)


def test_precisions_of_devices_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with switched_to(*TF32), Precisions(monkeypatch) as found:
        unrolled("cuda:0", wider, 1, "unroll", {})
    assert found.seen == {IEEE}


def test_experts_go_on_in_the_precision_that_they_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    options = {"num_experts": 1, "epochs": 2, "batch_size": 4, "engine": "generic"}
    path = tmp_path / "experts.store"

    def stop(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with switched_to(*CONV), pytest.raises(KeyboardInterrupt):
        train_experts(convnet, *batch, path, on_epoch=stop, **options)
    with switched_to(*TF32), Precisions(monkeypatch) as found, train_experts(convnet, *batch, path, **options) as store:
        assert store.options["precision"] == "tf32-conv"
    assert found.seen == {CONV}
    with switched_to(*IEEE), train_experts(convnet, *batch, path, overwrite=True, **options) as store:
        assert "precision" not in store.options


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_memory_is_constant_from_the_second_step_on(engine: str) -> None:
    found = []
    for _ in range(4):
        unrolled("cuda:0", convnet, 1, "match", {"engine": engine})
        # the device's thread holds the last backward pass, until the next one or a little while
        torch.ones(1, device="cuda", requires_grad=True).sum().backward()
        time.sleep(0.05)
        gc.collect()
        found.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert found[1] == found[2] == found[3], found


def test_other_threads_may_go_on_while_a_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, begin = [], torch.cuda.CUDAGraph.capture_begin

    def noted(self: Any, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
        modes.append(capture_error_mode)
        begin(self, pool, capture_error_mode, **options)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", noted)
    release_graphs()
    unrolled("cuda:0", wider, 1, "unroll", {})
    assert modes
    assert set(modes) <= {"thread_local", "relaxed"}


STORED = 3 * 4 * sum(p.numel() for p in convnet().parameters())
TAPE = kept_bytes(convnet_shape(convnet(), (2, SIDE, SIDE)), 1, 4, torch.float32)


@pytest.mark.parametrize(
    "options", [{"precision": "tf32"}, {"precision": "bf16"}, {"store_every": 2}, {"mode": "first_order"}], ids=str
)
def test_memory_changes_no_bit(options: dict[str, Any]) -> None:
    amounts = ("auto", STORED, STORED + TAPE, STORED + 2 * TAPE, 1 << 24)
    found = [unrolled("cuda:0", convnet, 1, "unroll", {"memory": memory, **options}) for memory in amounts]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    ("memory", "free", "kept"),
    [
        *((STORED, 0, 0), (STORED + TAPE, 0, 1), (STORED + 2 * TAPE, 0, 2), (1 << 24, 0, 3)),
        *(("auto", 0, 0), ("auto", 4 * TAPE, 1), ("auto", 12 * TAPE - 1, 2), ("auto", 1 << 40, 3)),
    ],
)
def test_memory_decides_how_many_steps_are_kept(
    memory: str | int, free: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, given, gradient, tangent = [], [], StepGraphs.gradient, StepGraphs.tangent

    def noted(self: StepGraphs, *tensors: Any, keep: bool = False, **options: Any) -> tuple:
        asked.append(keep)
        return gradient(self, *tensors, keep=keep, **options)

    def noted_tangent(self: StepGraphs, *tensors: Any, **options: Any) -> tuple:
        given.append(len(tensors) > 5)
        return tangent(self, *tensors, **options)

    monkeypatch.setattr(StepGraphs, "gradient", noted)
    monkeypatch.setattr(StepGraphs, "tangent", noted_tangent)
    calls = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls.append(device) or (free - free // 2, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 + free // 2)  # torch holds it without use
    unrolled("cuda:0", convnet, 1, "unroll", {"memory": memory})
    assert asked == given[::-1] == [False] * (3 - kept) + [True] * kept  # the last ones
    assert calls == [torch.device("cuda:0")] * (memory == "auto")


@pytest.mark.parametrize("engine", ["student", "generic"])
def test_how_many_steps_are_kept_is_decided_once(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, free = [], 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_allocated", torch.cuda.memory_reserved)  # torch holds none
    none, all_steps, options = KeptSteps(), KeptSteps(), {"warmup": 1, "at": (2, 3), "engine": engine}
    found = [unrolled("cuda:0", convnet, 1, "unroll", {"memory": none, **options})]
    free = 1 << 28
    found.append(unrolled("cuda:0", convnet, 1, "unroll", {"memory": none, **options}))
    assert asked == [torch.device("cuda:0")]
    found.append(unrolled("cuda:0", convnet, 1, "unroll", {"memory": all_steps, **options}))
    assert (none.number, all_steps.number) == (0, 2)  # of the window
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_memory_below_the_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^memory: expected at least {STORED} bytes for this unroll, got"):
        unrolled("cuda:0", convnet, 1, "unroll", {"memory": STORED - 1})


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_generators_are_left_as_they_were(mode: str) -> None:
    net = convnet().cuda()
    theta0 = torch.cat([p.detach().flatten() for p in net.parameters()])
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda().requires_grad_(), torch.arange(IMAGES, device="cuda") % CLASSES
    before = states()
    out = pydistill.unroll(net, theta0, images, labels, 0.1, steps=2, engine="generic", mode=mode)
    torch.autograd.grad(out.square().sum(), images)
    assert all(map(torch.equal, before, states()))


def states() -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, DEVICES)]


SEEDED = {
    "seeded_net": lambda path: seeded_net(convnet, 3, device="cuda"),
    "train_experts": lambda path: train_experts(
        convnet,
        drawn(IMAGES, 2, SIDE, SIDE).cuda(),
        torch.arange(IMAGES, device="cuda") % CLASSES,
        path / "experts.store",
        num_experts=1,
        epochs=1,
        batch_size=4,
    ),
}


@pytest.mark.parametrize("name", SEEDED)
def test_what_seeds_leaves_the_generators_of_the_devices(name: str, tmp_path: Path) -> None:
    before = states()
    SEEDED[name](tmp_path)
    assert all(map(torch.equal, before, states()))


def test_nets_have_the_same_values_on_all_devices_and_those_drawn_there_are_seeded() -> None:
    here, there = (seeded_net(convnet, 3, device=device).state_dict() for device in ("cpu", "cuda:1"))
    assert all(torch.equal(here[name], there[name].cpu()) for name in here)
    before = states()
    first, second = (seeded_net(lambda: nn.Linear(3, 2, device="cuda:1"), 3, device="cuda:1") for _ in "ab")
    assert torch.equal(first.weight, second.weight)
    assert all(map(torch.equal, before, states()))


def diverging(**options: Any) -> Tensor:
    net = convnet().cuda()
    theta0 = 0.3 * drawn(sum(p.numel() for p in net.parameters())).cuda()
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    return pydistill.unroll(net, theta0, images, labels, 1e38, steps=3, engine="generic", **options)


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_non_finite_parameters_are_looked_for_where_that_is_asked_for(mode: str) -> None:
    assert not diverging(mode=mode).isfinite().all()
    with pytest.raises(FloatingPointError, match=r"non-finite in step \d of 3"):
        diverging(mode=mode, check_finite=True)


def test_a_target_that_is_the_start_gives_no_finite_loss() -> None:
    net = convnet().cuda()
    theta0 = 0.3 * drawn(sum(p.numel() for p in net.parameters())).cuda()
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    loss = pydistill.trajectory_match(net, theta0, theta0, images, labels, 0.1, steps=2, engine="generic")
    assert not loss.isfinite()


def test_labels_are_looked_at_again_when_they_change() -> None:
    net = convnet().cuda()
    theta0 = 0.3 * drawn(sum(p.numel() for p in net.parameters())).cuda()
    images, labels = drawn(IMAGES, 2, SIDE, SIDE).cuda(), torch.arange(IMAGES, device="cuda") % CLASSES
    for _ in range(2):
        pydistill.unroll(net, theta0, images, labels, 0.1, steps=1, engine="generic")
    labels[0] = -1
    with pytest.raises(ValueError, match="labels: expected class numbers >= 0, got -1"):
        pydistill.unroll(net, theta0, images, labels, 0.1, steps=1, engine="generic")


def test_batches_may_be_on_the_cpu() -> None:
    net = convnet()
    batches = [torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([5, 2, 4])]
    found = []
    for place, given in (("cpu", batches), ("cuda:1", batches), ("cuda:1", [each.to("cuda:1") for each in batches])):
        theta0 = 0.3 * drawn(sum(p.numel() for p in net.parameters())).to(place)
        images, labels = drawn(IMAGES, 2, SIDE, SIDE).to(place), torch.arange(IMAGES, device=place) % CLASSES
        options = {"steps": 3, "batches": given, "engine": "generic"}
        found.append(pydistill.unroll(net.to(place), theta0, images, labels, 0.1, **options))
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1].cpu(), found[0])
    wrong = [each.to("cuda:0") for each in batches]
    with pytest.raises(ValueError, match=r"batches\[0\]: expected all on cuda:1 as images, or all on cpu, got cuda:0"):
        pydistill.unroll(net, theta0, images, labels, 0.1, **options | {"batches": wrong})
    with pytest.raises(ValueError, match=r"batches: expected image numbers in 0..5, got 6"):
        pydistill.unroll(net, theta0, images, labels, 0.1, **options | {"batches": [*batches[:2], torch.tensor([6])]})


def trained(device: str, net: Any, options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    net = net().to(device)
    theta0 = torch.cat([p.detach().flatten() for p in net.parameters()]) + 0.1 * drawn(2, 1).to(device)
    images, labels = drawn(10, 2, SIDE, SIDE).to(device), (torch.arange(10) % CLASSES).to(device)
    found = train_students(
        net,
        theta0,
        images,
        labels,
        **{"epochs": 2, "lr": 0.05, "batch_size": 4, "generator": torch.Generator().manual_seed(2), **options},
        eval_data=(images, labels),
        train_accuracy=True,
    )
    return [found.theta, found.losses, found.accuracy, found.train_accuracy]


TRAININGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "student": (convnet, {"momentum": 0.9, "weight_decay": 0.01, "schedule": "cosine"}),
    "student, augmented": (convnet, {"augment": DiffAugment("color_crop_cutout_flip_scale_rotate")}),
    "student, bf16": (convnet, {"precision": "bf16"}),
    "student, tf32": (convnet, {"precision": "tf32"}),
    "generic": (convnet, {"engine": "generic", "momentum": 0.9}),
    "generic, bf16": (convnet, {"engine": "generic", "precision": "bf16"}),
    "generic, buffers": (batch_normed, {}),
    "sharpness": (convnet, {"sharpness": GSAM(rho=0.05, alpha=0.1)}),
}
TRAINED = [(name, device) for name in TRAININGS for device in DEVICES]


@pytest.mark.parametrize(("name", "device"), sample(TRAINED, [case for case in TRAINED if case[1] == "cuda:0"]))
def test_trained_students(name: str, device: str) -> None:
    net, options = TRAININGS[name]
    want = trained("cpu", net, {**options, "precision": on_cpu(options)})
    assert_equal(trained(device, net, options), want, device, 0.05 if "bf16" in name else 1e-4)
