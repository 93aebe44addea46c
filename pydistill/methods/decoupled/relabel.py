"""Relabel: a teacher's soft labels for many random views of each image of a distilled set.

FKD (Shen and Xing, ECCV 2022) as SRe2L uses it: an epoch shows each image once, cropped, mirrored and mixed with
another of its batch, and the teachers' output for the view is stored with the few numbers that define the view.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import MultiCrop, mix_labels, record_from_bytes, record_to_bytes
from pydistill.augment.record import HEADER, MAGIC, PACKED
from pydistill.data import DistilledSet
from pydistill.labels import SoftLabels, SoftLabelStore
from pydistill.methods import ranks
from pydistill.methods.decoupled.squeeze import Teacher, files_of
from pydistill.methods.method import Inputs, Job, Method, check_numbers
from pydistill.methods.precision import Precision, agree, check_precision, rounded
from pydistill.nn import freeze
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory.experts import data_crc32

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.runs import Run

__all__ = ["Relabel", "check_fit", "check_store", "relabel", "replayed", "told", "views_of"]


@dataclass(frozen=True)
class RelabelInputs(Inputs):
    """The images, and the squeezed networks."""

    images: Path
    """The distilled.safetensors of recover."""
    teacher: tuple[Path, ...]
    """The squeezed network's file; for several, the mean of their logits is taken."""
    network: str | None = None
    """package.module:function that makes your own network, whose weights are in the files of --teacher."""


@dataclass(frozen=True)
class Relabel(Method):
    """How the soft labels are made and stored; the defaults are SRe2L's."""

    name: ClassVar[str] = "relabel"
    about: ClassVar[str] = "store the network's soft labels of their augmented views"
    paper: ClassVar[str] = "Shen and Xing, ECCV 2022"
    group: ClassVar[str] = "decoupled"
    inputs: ClassVar[type[Inputs]] = RelabelInputs
    shared: ClassVar[bool] = True

    epochs: int = 300
    """Views of each image."""
    batch_size: int = 128
    """Images that are shown and mixed together."""
    crop: float = 0.08
    """The least share of an image's area that a view shows."""
    flip: float = 0.5
    """Probability of a mirrored view."""
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    """How an image is mixed with another of its batch."""
    alpha: float = 1.0
    """The share of each of two mixed images is drawn from Beta(alpha, alpha)."""
    static: bool = False
    """Mix labels of the whole images (INFER) instead of running the teachers on each view."""
    temperature: float = 20.0
    """Temperature T, by which the student's and the teachers' logits are divided."""
    format: Literal["fp32", "fp16", "bf16", "logits8", "features8", "topk", "topk8"] = "fp16"
    """How a label is stored: all logits in 32, 16 or 8 bits, the teachers' features in 8 bits and their last layers
    once, or the largest k probabilities; the error of the student's gradients is measured and shown."""
    k: int = 10
    """Number of probabilities that topk and topk8 keep."""
    seed: int = 0
    """Seed of all random draws."""
    precision: Precision = "auto"
    """What teachers run in: ieee (also called fp32), bf16, or on a GPU fp16, tf32 (tf32-conv, tf32-matmul:
    convolutions or matrix products alone). auto is, on a GPU, what torch's switches say when the run begins, which it
    keeps: tf32-conv by torch's default; on the CPU ieee, unless torch's switches say otherwise."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"epochs": 200, "batch_size": 25, "crop": 0.5, "flip": 0.0},
        "fashion-mnist": {"epochs": 400, "batch_size": 25, "crop": 0.5},
        "cifar10": {"epochs": 400},
        "cifar100": {"epochs": 400},
        "tiny-imagenet": {"epochs": 200, "batch_size": 64},
        "imagenet-1k": {"batch_size": 1024},
    }
    # the paper's labels: mixup with Beta(0.8, 0.8), of the whole images
    infer: ClassVar[dict[str, Any]] = {"mix": "mixup", "alpha": 0.8, "static": True}

    @classmethod
    def preset(cls, dataset: str, method: str = "") -> Self:
        """The values for a data set and the method that made the images; ValueError names the available sets."""
        return cls._for(super().preset(dataset), method)

    @classmethod
    def nearest_preset(cls, dataset: str, method: str = "") -> Self:
        return cls._for(super().nearest_preset(dataset), method)

    @classmethod
    def _for(cls, values: Self, method: str) -> Self:
        return replace(values, **cls.infer) if method == "infer" else values

    def unused(self, inputs: RelabelInputs) -> dict[str, str]:
        unused = {} if self.format.startswith("topk") else {"k": f" with format={self.format}"}
        return unused | ({"alpha": " with mix=none"} if self.mix == "none" else {})

    def job(self, inputs: RelabelInputs, device: torch.device) -> RelabelJob:
        return RelabelJob(self, inputs, device)

    def __post_init__(self) -> None:
        check_numbers(self, epochs=1, batch_size=1, k=1, temperature=0.0, seed=0)
        check_precision(self.precision)
        self.crops(2)  # raises for numbers that are out of range
        if self.static and self.mix == "cutmix":
            raise ValueError("static: expected mix='mixup' or 'none': cutmix has no label without asking the teachers")

    def crops(self, side: int) -> MultiCrop:
        mix = None if self.mix == "none" else self.mix
        return MultiCrop(side, scale=(self.crop, 1.0), flip=self.flip, mix=mix, alpha=self.alpha)

    def views(self, shape: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches: the numbers of their images, and the record of their views."""
        generator, crops = seeded_generator(self.seed, Stream.RELABEL_BATCHES, epoch), self.crops(shape[2])
        for index in torch.randperm(shape[0], generator=generator, device="cpu").split(self.batch_size):
            yield index, crops.draw(shape, generator, sources=index)


@torch.no_grad()
def relabel(
    config: Relabel,
    distilled: DistilledSet,
    teachers: Sequence[Teacher],
    path: str | os.PathLike[str],
    *,
    rank: int = 0,
    world: int = 1,
    on_epoch: Callable[[int], None] | None = None,
) -> SoftLabelStore:
    """Writes this rank's share of the epochs, every ``world``-th from ``rank`` on, into a store; existing ones stay.

    Killed at any moment, it continues where the store ends when called again, to the same bits (with as many threads:
    torch's own convolutions promise no more).

    Args:
        config: the views, and how labels are stored.
        distilled: the images, in the teachers' space.
        teachers: their mean logits are the labels.
        path: of the store, created if missing; ranks need one each, to be joined by `SoftLabelStore.merge`.
        rank, world: see above.
        on_epoch: called with the number of each finished epoch; an exception from it ends the run.

    Raises:
        ValueError: a teacher of other classes or images than the set's, one whose last layer is not an ``nn.Linear``
            with the format "features8", or a store of other images, options or teachers.
    """
    for teacher in teachers:
        check_fit(distilled, teacher.num_classes, teacher.shape)
    device = next(teachers[0].net.parameters()).device
    check_precision(config.precision, device)
    config = config.on(device)
    images = distilled.images.to(device)
    networks = [freeze(teacher.net) for teacher in teachers]
    nets: Sequence[Callable[[Tensor], Tensor]] = networks
    classifier = None
    if config.format == "features8":
        heads = [last_linear(net, images[:1]) for net in networks]
        nets, classifier = [_Features(net, head) for net, head in zip(networks, heads, strict=True)], _mean_of(heads)

    if Path(path).exists():
        store = SoftLabelStore.open(path, writable=True)
        check_store(store, config, distilled)
        others = store.metadata.get("teachers_crc32", (crc := _crc32(teachers))) != crc  # older stores do not say
        if classifier is not None:
            kept = cast(tuple[Tensor, Tensor], store.classifier)
            others |= not all(map(torch.equal, kept, [each.cpu() for each in classifier]))
        if others:
            store.close()
            raise ValueError(f"{path}: expected labels of these teachers, got those of others")
    else:
        store = SoftLabelStore.create(
            path,
            num_images=len(images),
            num_classes=teachers[0].num_classes,
            epochs=config.epochs,
            **{name: getattr(config, name) for name in ("format", "k", "batch_size")},
            T=config.temperature,
            classifier=classifier,
            record_bytes=(1 if config.mix == "none" else 2) * PACKED.itemsize,
            sources="images",
            metadata=_metadata(config, distilled) | {"teachers_crc32": _crc32(teachers)},
        )
    crops = config.crops(images.shape[2])
    with store, rounded(config.precision, device) as rounding:

        def ask(x: Tensor) -> Tensor:
            """The mean logits; for "features8", the features of all teachers."""
            found = [rounding(net, x) for net in nets]
            return torch.stack(found).mean(0) if classifier is None else torch.cat(found, 1)

        whole = torch.cat([ask(part) for part in images.split(config.batch_size)]) if config.static else None
        for epoch in range(rank, config.epochs, world):
            for block, (index, record) in enumerate(config.views(images.shape, epoch)):
                if store.holds(epoch, block):
                    continue
                if whole is None:
                    labels = ask(crops(images, record))
                else:
                    labels = mix_labels(whole, to_device(record, device), crops.size)
                store.write(epoch, index, labels, _as_rows(record))
            if on_epoch is not None:
                on_epoch(epoch)
    return SoftLabelStore.open(path)


@torch.no_grad()
def last_linear(net: nn.Module, images: Tensor) -> nn.Linear:
    """The ``nn.Linear`` whose output is the network's, found by running it on some images.

    Raises:
        ValueError: there is none.
    """
    seen: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
        for module in net.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = net(images)
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        head, x = seen[-1]
        found = F.linear(x, head.weight, head.bias)
        if found.shape == logits.shape and float((found - logits).abs().max()) <= 1e-4 * float(logits.abs().max()):
            return head
    raise ValueError(f"teachers: expected networks that end in an nn.Linear for 'features8', got {net!r:.60}")


class _Features:
    """A network up to its last layer."""

    def __init__(self, net: nn.Module, head: nn.Linear):
        self.net = net
        self.found: list[Tensor] = []
        head.register_forward_pre_hook(lambda module, inputs: self.found.append(inputs[0]))

    def __call__(self, x: Tensor) -> Tensor:
        self.net(x)
        return self.found.pop()


def _mean_of(heads: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """One layer that gives the mean of several from their inputs, side by side."""
    biases: list[Tensor] = [
        head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias for head in heads
    ]
    return torch.cat([head.weight for head in heads], 1) / len(heads), torch.stack(biases).mean(0)


def replayed(labels: SoftLabels) -> Tensor:
    """The record of the views that labels belong to; it names images of the whole set."""
    rows = labels.records.numpy()
    header = HEADER.pack(MAGIC, len(rows), rows.shape[1] // PACKED.itemsize)
    return record_from_bytes(header + rows.tobytes())


def _as_rows(record: Tensor) -> np.ndarray:
    """A record as uint8 ``[B, record_bytes]``, without the part common to all rows."""
    return np.frombuffer(record_to_bytes(record), np.uint8, offset=HEADER.size).reshape(len(record), -1)


def _metadata(config: Relabel, distilled: DistilledSet) -> dict[str, Any]:
    return {"relabel": asdict(config), "images_crc32": data_crc32(distilled.images, distilled.labels)}


def _crc32(teachers: Sequence[Teacher]) -> int:
    """Of all parameters and buffers, with their names and shapes."""
    found = 0
    for teacher in teachers:
        for name, value in teacher.net.state_dict().items():
            if isinstance(value, Tensor):  # and nothing else that a module keeps there
                found = zlib.crc32(f"{name} {list(value.shape)}".encode(), found)
                found = zlib.crc32(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


def views_of(store: SoftLabelStore) -> Relabel:
    """How the labels in a store were made; ValueError for one that `relabel` did not make."""
    try:
        return Relabel(**store.metadata["relabel"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{store.path}: expected labels and views that relabel made, got others ({error!r})"
        ) from error


def check_store(store: SoftLabelStore, config: Relabel, distilled: DistilledSet) -> None:
    """ValueError for a store of other images than the set's, or of other views than ``config`` says."""
    wanted = _metadata(config, distilled)
    if store.metadata.get("images_crc32") != wanted["images_crc32"]:
        raise ValueError(f"{store.path}: expected labels of these images, got those of others")
    kept = {"precision": "auto", **store.metadata.get("relabel", {})}  # which older stores do not name
    if agree(kept["precision"], config.precision) or agree(config.precision, kept["precision"]):
        kept = kept | {"precision": config.precision}
    different = [f"{name}={kept.get(name)!r}" for name, v in wanted["relabel"].items() if kept.get(name) != v]
    if different:
        raise ValueError(f"{store.path}: expected labels of {config}, got some of {', '.join(different)}")


def check_fit(distilled: DistilledSet, num_classes: int, shape: tuple[int, ...]) -> None:
    """ValueError for a teacher of other classes or images than the set's."""
    found = len(distilled.config.get("class_names", ())) or int(distilled.labels.max()) + 1
    if found != num_classes:
        raise ValueError(f"teachers: expected {found} classes as the images have, got {num_classes}")
    if tuple(distilled.images.shape[1:]) != shape:
        raise ValueError(f"teachers: expected images of {list(distilled.images.shape[1:])}, got {list(shape)}")


class RelabelJob(Job):
    """Stores the teachers' soft labels of many views of each image: labels.store. The ranks share the epochs."""

    title, made = "relabel", ("labels.store",)

    def __init__(self, config: Relabel, inputs: RelabelInputs, device: torch.device):
        self.config, self.inputs, self.results = config, inputs, {}
        check_precision(config.precision, device)
        self.distilled = DistilledSet.load(inputs.images)
        self.teachers = [Teacher.load(path, device, network=inputs.network) for path in files_of(inputs.teacher)]
        for teacher in self.teachers:
            check_fit(self.distilled, teacher.num_classes, teacher.shape)

    def stored(self) -> dict[str, Any]:
        return {"command": "relabel", **asdict(self.config)}

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        # all epochs are gone through again, and reported again, to find the missing ones
        return ranks.world()[1] > 1 and (run.folder / "labels.store").exists()

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.relabel, self.merge

    def _part(self, run: Run, rank: int, size: int) -> Path:
        return run.folder / (f"labels-rank{rank}-of-{size}.store" if size > 1 else "labels.store")

    def relabel(self, run: Run) -> None:
        rank, size = ranks.world()
        advance = run.progress("relabel", -(-self.config.epochs // size))

        def on_epoch(epoch: int) -> None:
            run.log({"phase": "relabel", "epoch": epoch})
            advance()
            run.stop()

        if size == 1 or not (run.folder / "labels.store").exists():
            path = self._part(run, rank, size)
            relabel(self.config, self.distilled, self.teachers, path, rank=rank, world=size, on_epoch=on_epoch)
        ranks.wait_for_ranks()

    def merge(self, run: Run) -> None:
        size, whole = ranks.world()[1], run.folder / "labels.store"
        if run.first and size > 1 and not whole.exists():
            SoftLabelStore.merge([self._part(run, each, size) for each in range(size)], whole)
        self.results["epochs"] = self.config.epochs
        if run.first:
            with SoftLabelStore.open(whole) as store:
                run.tell(told(store))
                self.results["gradient_error"] = store.gradient_error and store.gradient_error._asdict()


def told(store: SoftLabelStore) -> str:
    """What a store's format costs."""
    form = f"{store.format}, k={store.k} of {store.num_classes}" if store.k else store.format
    error = store.gradient_error
    cost = "not measured: the file is of an older version" if error is None else str(error)
    return f"labels in {form}, at temperature {store.T:g}; error of the student's gradients: {cost}"
