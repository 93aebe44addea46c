"""Post-train: a student learns a distilled set from stored labels of exactly the views that it sees.

    loss = KL(softmax(teacher / T) || softmax(student / T))

without the factor T^2, as in SRe2L's code, by AdamW under half a cosine. No teacher is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import mix_labels
from pydistill.data import Dataset, DistilledSet, StreamedDataset, StreamedImages
from pydistill.evaluate import accuracy
from pydistill.labels import SoftLabelStore
from pydistill.methods.decoupled.relabel import Relabel, check_store, replayed, told, views_of
from pydistill.methods.decoupled.squeeze import NetworkName, Teacher, build, load_images
from pydistill.methods.method import Inputs, Job, Method, OptionError, check_numbers
from pydistill.methods.precision import Precision, check_precision, rounded
from pydistill.methods.training import OnEpoch, train
from pydistill.seeding import Stream, seeded_net

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

__all__ = ["PostTrain", "new_student", "post_train"]


@dataclass(frozen=True)
class PostTrainInputs(Inputs):
    """The images and their labels."""

    images: Path
    """The distilled.safetensors of recover."""
    labels: Path
    """The labels.store of relabel, whose views the student sees."""
    hard: bool = False
    """Train on the images' classes instead of the stored labels, on the same views."""
    root: Path | None = None
    """Folder of the data set's files, for its test images."""
    workers: int | None = None
    """Processes that decode pictures; by default one for each core, up to 8."""
    students: int = 1
    """Number of students, with consecutive seeds from --seed."""


@dataclass(frozen=True)
class PostTrain(Method):
    """How a student is trained on a distilled set: AdamW under half a cosine, one view of each image per epoch."""

    name: ClassVar[str] = "post-train"
    about: ClassVar[str] = "train a student on images and labels, and test it"
    paper: ClassVar[str] = "Yin, Xing, Shen, NeurIPS 2023"
    group: ClassVar[str] = "decoupled"
    inputs: ClassVar[type[Inputs]] = PostTrainInputs

    network: NetworkName = "resnet18"
    """convnet is the ConvNet of the condensation papers with BatchNorm."""
    width: int = 64
    """Channels of the (first) stage."""
    depth: int = 3
    """Blocks of convnet."""
    lr: float = 1e-3
    """Initial learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    seed: int = 0
    """Seed of the initial parameters."""
    precision: Precision = "auto"
    """What students are trained in: ieee (also called fp32), bf16, or on a GPU fp16, tf32 (tf32-conv, tf32-matmul:
    convolutions or matrix products alone). auto is, on a GPU, what torch's switches say when the run begins, which it
    keeps: tf32-conv by torch's default; on the CPU ieee, unless torch's switches say otherwise."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"network": "convnet", "width": 32},
        "fashion-mnist": {"network": "convnet", "width": 32},
        **{name: {} for name in ("cifar10", "cifar100", "tiny-imagenet", "imagenet-1k")},
    }

    def unused(self, inputs: PostTrainInputs) -> dict[str, str]:
        return {} if self.network == "convnet" else {"depth": f" with network={self.network}"}

    def job(self, inputs: PostTrainInputs, device: torch.device) -> PostTrainJob:
        return PostTrainJob(self, inputs, device)

    def __post_init__(self) -> None:
        check_numbers(self, width=1, depth=1, lr=0.0, weight_decay=0, seed=0)
        check_precision(self.precision)


def new_student(
    config: PostTrain,
    distilled: DistilledSet,
    views: Relabel,
    store: SoftLabelStore | None,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The student before its training; raises as `post_train` does if its arguments do not fit."""
    _, channels, side, _ = distilled.images.shape
    if store is not None:
        if store.num_classes != num_classes:
            raise ValueError(f"store: expected labels of {num_classes} classes, got {store.num_classes}")
        check_store(store, views, distilled)
        store.check_complete()
    elif distilled.label_kind != "hard" or int(distilled.labels.max()) >= num_classes:
        raise ValueError(f"labels: expected hard labels of {num_classes} classes where there is no store, got others")
    options = {"channels": channels, "num_classes": num_classes, "image_size": side}
    make = partial(build, config.network, width=config.width, depth=config.depth, **options)
    return seeded_net(make, config.seed, Stream.POST_TRAINED, device=device)


def post_train(
    config: PostTrain,
    distilled: DistilledSet,
    views: Relabel,
    store: SoftLabelStore | None = None,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
    state: dict[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
) -> nn.Module:
    """Trains a fresh student on a distilled set and returns it, in evaluation mode.

    Args:
        config: the student.
        distilled: the images.
        views: what the store was made with: the epochs, batches and views.
        store: of soft labels; without one, the set's own hard labels on the same views, mixed as the images are.
        num_classes: of the student.
        device: where to compute.
        state, on_epoch: as `pydistill.methods.training.train` takes them.

    Raises:
        ValueError: a store of other images, classes or views, or without all epochs, which are named.
    """
    net = new_student(config, distilled, views, store, num_classes=num_classes, device=device)
    images = distilled.images.to(device)
    count, side = images.shape[0], images.shape[2]
    crops = views.crops(side)

    with rounded(config.precision, images.device) as rounding:
        net = rounding.laid_out(net).train()
        optimizer = torch.optim.AdamW(
            net.parameters(), config.lr, weight_decay=config.weight_decay, fused=rounding.fused
        )

        def soft(epoch: int) -> Iterator[tuple[int, Any]]:
            assert store is not None
            for index in store.batches(epoch):
                labels = store.read(epoch, index).to(device)
                x = crops(images, replayed(labels))
                yield 1, lambda x=x, labels=labels: labels.loss(rounding(net, x))

        def hard(epoch: int) -> Iterator[tuple[int, Any]]:
            for _, record in views.views(images.shape, epoch):
                target = to_device(mix_labels(distilled.labels, record, side, num_classes=num_classes), device)
                x = crops(images, record)
                yield 1, lambda x=x, target=target: F.cross_entropy(rounding(net, x), target)

        train(
            net,
            optimizer,
            hard if store is None else soft,
            epochs=views.epochs,
            steps=-(-count // views.batch_size),
            state=state,
            scaler=rounding.scaler(),
            on_epoch=on_epoch,
        )
    return net.eval()


class PostTrainJob(Job):
    """Trains fresh students on the images and their stored labels, and tests them: student.safetensors."""

    title, made = "post-train", ("results.json",)
    data: Dataset

    def __init__(self, config: PostTrain, inputs: PostTrainInputs, device: torch.device):
        check_numbers(inputs, OptionError, students=1)
        check_precision(config.precision, device)
        self.config, self.inputs, self.device = config, inputs, device
        self.results: dict[str, Any] = {"accuracy": []}
        self.distilled = DistilledSet.load(inputs.images)
        self.store = SoftLabelStore.open(inputs.labels)
        self.views = views_of(self.store)
        if (dataset := self.distilled.config.get("dataset")) is None:
            wanted = "a set that says what it was made from, to be tested on that"
            raise ValueError(f"{inputs.images}: expected {wanted}")
        distilled = self.distilled
        space = (distilled.mean, distilled.std) if distilled.zca is None else None
        options: dict[str, Any] = {"workers": inputs.workers, "space": space}
        self.data = load_images(dataset, inputs.root, distilled.images.shape[2], **options)
        if isinstance(self.data, StreamedDataset) and distilled.zca is not None:
            wanted = "images that are not whitened, to be tested on streamed ones"
            raise ValueError(f"{inputs.images}: expected {wanted}")
        test: Tensor | StreamedImages = self.data.test_images
        if not isinstance(self.data, StreamedDataset):
            test = distilled.normalise(self.data.test_images, self.data)
        self.test_images = test.to(device)
        self.options: dict[str, Any] = {"num_classes": self.data.num_classes, "device": device}
        self.soft = None if inputs.hard else self.store
        new_student(config, self.distilled, self.views, self.soft, **self.options)  # refuses what does not fit

    def stored(self) -> dict[str, Any]:
        inputs = self.inputs
        return {
            "command": "post-train",
            "config": asdict(self.config),
            "hard": inputs.hard,
            "students": inputs.students,
        }

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return [partial(self.train, number=number) for number in range(self.inputs.students)]

    def train(self, run: Run, number: int) -> None:
        """Student ``number``, from its own seed."""
        if number == 0 and self.soft is not None:
            run.tell(told(self.store))
        data, distilled = self.data, self.distilled
        config = replace(self.config, seed=self.config.seed + number)
        with run.epochs(f"student{number}", self.views.epochs) as (state, on_epoch):
            options = {**self.options, "state": state, "on_epoch": on_epoch}
            net = post_train(config, distilled, self.views, self.soft, **options)
        found = accuracy(net, self.test_images, data.test_labels.to(self.device))
        self.results["accuracy"].append(found)
        about = asdict(config) | {"channels": data.channels, "image_size": distilled.images.shape[2]}
        about["dataset"] = data.name
        name = "student.safetensors" if self.inputs.students == 1 else f"student{number}.safetensors"
        Teacher(net, distilled.mean, distilled.std, data.class_names, about).save(run.folder / name)
