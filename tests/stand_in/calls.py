"""Calls of the package whose cost on a GPU is counted."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pydistill
from pydistill.augment import DiffAugment, MultiCrop
from pydistill.methods import DWA, Relabel, Squeeze, SRe2L, run
from pydistill.methods.matching.fedlgd import FedLGD
from pydistill.methods.precision import rounded
from pydistill.methods.training import train
from pydistill.nn import ConvNet
from pydistill.trajectory import Adam, train_students
from pydistill.trajectory.experts import train_experts
from pydistill.trajectory.students import Engine
from tests.bars import make_dataset, make_net
from tests.methods.test_methods import CONFIGS
from tests.stand_in.counts import Counts, counts

AUGMENT = DiffAugment("color_crop_cutout_flip_scale_rotate")
NET = {"network": "convnet", "width": 4, "depth": 2}


def second(call: Callable[[], Any]) -> Counts:
    """What the second of two equal calls costs."""
    for _ in range(2):
        with counts() as c:
            call()
    return c


def difference(call: Callable[[int], Any], few: int, many: int) -> Counts:
    """What ``many - few`` steps more cost, after the first calls."""
    call(few)
    with counts() as less:
        call(few)
    with counts() as more:
        call(many)
    numbers = ("launches", "copies", "allocations", "captures", "replays")
    found = Counts(**{name: getattr(more, name) - getattr(less, name) for name in numbers})
    left = list(less.waits)
    found.waits = [wait for wait in more.waits if wait not in left or left.remove(wait)]
    found.places = more.places - less.places
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def unrolled(match: bool = False, students: int = 1, **options: Any) -> Callable[[], Counts]:
    def count() -> Counts:
        net = ConvNet(2, 3, width=4, depth=2, image_size=8).cuda()
        P = sum(p.numel() for p in net.parameters())
        theta0 = (0.3 * drawn(students, P)).squeeze(0).cuda()
        images, labels = drawn(6, 2, 8, 8).cuda().requires_grad_(), torch.arange(6, device="cuda") % 3
        lr, target = torch.tensor(0.05, device="cuda", requires_grad=True), theta0 + 0.1

        def call() -> None:
            given = {"steps": 3, "generator": torch.Generator().manual_seed(1), **options}
            if match:
                loss = pydistill.trajectory_match(net, theta0, target, images, labels, lr, **given)
            else:
                loss = pydistill.unroll(net, theta0, images, labels, lr, **given).square().sum()
            torch.autograd.grad(loss, [images, lr])

        return second(call)

    return count


def trained(**options: Any) -> Callable[[], Counts]:
    """Three steps more of an epoch."""

    def call(steps: int) -> None:
        net = ConvNet(2, 3, width=4, depth=2, image_size=8).cuda()
        theta0 = torch.cat([p.detach().flatten() for p in net.parameters()])[None]
        images, labels = drawn(2 * steps, 2, 8, 8).cuda(), torch.arange(2 * steps, device="cuda") % 3
        generator = torch.Generator().manual_seed(1)
        train_students(net, theta0, images, labels, epochs=1, lr=0.1, batch_size=2, generator=generator, **options)

    return lambda: difference(call, 2, 5)


@cache
def experts() -> Tensor:
    data = make_dataset()
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3}
        images, labels = data.train_images, data.train_labels
        return train_experts(make_net, images, labels, Path(folder) / "experts.store", **options).tensor()


OUTER = CONFIGS | {
    "datadam, batch norm": replace(CONFIGS["datadam"], net_norm="batch"),
    "fedlgd": FedLGD(ipc=1, clients=2, local_steps=2, train_steps=2, server_steps=2),
}


def outer_step(name: str) -> Callable[[], Counts]:
    def count() -> Counts:
        config, data, net = OUTER[name], make_dataset().to(torch.device("cuda")), make_net().cuda()
        given = config.check(data, net, experts())
        state = config.initial(data, net, given)

        def call() -> None:
            config.step(state, data, net, given)
            state.iteration += 1

        return second(call)

    return count


def trained_by_torch(precision: str = "auto") -> Callable[[], Counts]:
    """Three steps more of an epoch of a teacher or a student after distillation."""

    def call(steps: int) -> None:
        x, y = drawn(6, 1, 6, 6).cuda(), torch.arange(6, device="cuda") % 3
        with rounded(precision, x.device) as rounding:
            net = rounding.laid_out(make_net().cuda())
            losses = [(1, lambda: F.cross_entropy(rounding(net, x), y))] * steps
            optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, fused=rounding.fused)
            train(net, optimizer, lambda epoch: losses, epochs=1, steps=steps, scaler=rounding.scaler())

    return lambda: difference(call, 2, 5)


def regressed() -> Counts:
    real, x, y = drawn(20, 4).cuda(), drawn(6, 4).cuda().requires_grad_(), drawn(6, 3).cuda()
    return second(lambda: pydistill.krr_loss(real, x, y_real=real[:, :3], y_syn=y).backward())


def of_classes(engine: Engine, places: Sequence[int]) -> Callable[[], Counts]:
    """Gradients of four classes, which have as many images as ``places`` says, labelled on the device."""

    def count() -> Counts:
        net = ConvNet(2, 4, width=4, depth=2, image_size=8).cuda()
        theta = 0.3 * drawn(sum(p.numel() for p in net.parameters())).cuda()
        images = drawn(sum(places), 2, 8, 8).cuda().requires_grad_()
        labels = torch.arange(4).repeat_interleave(torch.tensor(places)).flip(0).cuda()

        def call() -> None:
            pydistill.matching.class_gradients(net, theta, images, labels, 4, engine=engine).square().sum().backward()

        return second(call)

    return count


def cropped() -> Counts:
    images = drawn(4, 3, 16, 16).cuda().requires_grad_()
    crops = MultiCrop(8, mix="cutmix", mean=(0.5,) * 3, std=(0.2,) * 3)
    return second(lambda: crops(images, crops.draw(images.shape, torch.Generator().manual_seed(1))).sum().backward())


@cache
def squeezed() -> Path:
    folder = Path(tempfile.mkdtemp())
    run(Squeeze(**NET, epochs=1, lr=0.05), out=folder / "teacher", image_size=8, device="cuda")
    teacher = folder / "teacher" / "teacher.safetensors"
    run(SRe2L(ipc=1, iterations=1), out=folder / "images", teacher=teacher, device="cuda")
    return folder


def recovered(config: SRe2L) -> Callable[[], Counts]:
    """Three iterations more."""

    def call(iterations: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            teacher = squeezed() / "teacher" / "teacher.safetensors"
            run(replace(config, iterations=iterations), out=Path(folder) / "out", teacher=teacher, device="cuda")

    return lambda: difference(call, 2, 5)


def relabelled() -> Counts:
    """Three epochs more of one batch."""

    def call(epochs: int) -> None:
        made = squeezed()
        files = {"images": made / "images" / "distilled.safetensors", "teacher": made / "teacher/teacher.safetensors"}
        with tempfile.TemporaryDirectory() as folder:
            run(Relabel(epochs=epochs), out=Path(folder) / "out", device="cuda", **files)

    return difference(call, 2, 5)


# by name: the counts, and the waits that there may be
CALLS: dict[str, tuple[Callable[[], Counts], int]] = {
    "unroll": (unrolled(), 0),
    "unroll, batches": (unrolled(batch_size=4), 0),
    "unroll, augmented": (unrolled(augment=AUGMENT), 0),
    "unroll, generic": (unrolled(engine="generic"), 0),
    "unroll, generic, augmented": (unrolled(engine="generic", augment=AUGMENT), 0),
    "unroll, Adam": (unrolled(optimizer=Adam(), warmup=1), 0),
    "unroll, generic, stored on the host": (unrolled(engine="generic", store="host", store_every=2), 0),
    "trajectory_match": (unrolled(match=True), 0),
    "trajectory_match, several": (unrolled(match=True, students=2, batch_size=4), 0),
    "trajectory_match, augmented": (unrolled(match=True, augment=AUGMENT), 0),
    "three training steps": (trained(), 0),
    "three training steps, augmented": (trained(augment=AUGMENT), 0),
    "three training steps, generic": (trained(engine="generic"), 0),
    **{f"outer step of {name}": (outer_step(name), 2) for name in OUTER},
    "class_gradients": (of_classes("auto", (2, 2, 2, 2)), 0),
    "class_gradients, uneven": (of_classes("auto", (1, 2, 3, 1)), 0),
    "class_gradients, generic": (of_classes("generic", (1, 2, 3, 1)), 0),
    "MultiCrop": (cropped, 0),
    "krr_loss": (regressed, 1),
    "three steps of train": (trained_by_torch(), 0),
    "three steps of train, fp16": (trained_by_torch("fp16"), 0),
    "three iterations of sre2l": (recovered(SRe2L(ipc=1)), 0),
    "three iterations of sre2l, fp16": (recovered(SRe2L(ipc=1, precision="fp16")), 0),
    "three iterations of dwa": (recovered(DWA(ipc=1)), 0),
    "three epochs of relabel": (relabelled, 3),
}


NUMBERS = ("waits", "captures", "replays", "launches", "copies", "allocations")


def table(former: Path | None) -> None:
    """Prints what each call costs, beside the columns "... before" of a ``former`` table."""
    rows: dict[str, dict[str, str]] = {}
    if former is not None:
        with former.open(newline="") as file:
            rows = {row["call"]: row for row in csv.DictReader(file)}
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["call", *(f"{name}{when}" for name in NUMBERS for when in (" before", "")[former is None :])])
    for name, (count, _) in CALLS.items():
        torch.manual_seed(0)
        found, row = count(), [name]
        for each in NUMBERS:
            number = getattr(found, each)
            row += [] if former is None else [rows.get(name, {}).get(f"{each} before", "")]
            row.append(str(len(number) if isinstance(number, list) else number))
        out.writerow(row)
        sys.stdout.flush()
