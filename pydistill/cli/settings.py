"""What a data set's runs take, beside the method's own preset, for options that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydistill.cli.console import device_of
from pydistill.data import Dataset, load
from pydistill.nn import ConvNet

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "image-folder"]
NetName = Literal["convnet", "mlp", "alexnet", "vgg11", "resnet18", "resnet18_ap", "vit"]


@dataclass(frozen=True)
class Setting:
    # the network: width and depth of the ConvNet
    width: int
    depth: int
    # the experts
    num_experts: int
    train_epochs: int
    lr_expert: float
    batch_train: int
    # the students: passes over a small set, passes over the whole training set, their learning rate on real images
    student_epochs: int
    whole_epochs: int
    lr_student: float


_PAPERS = Setting(128, 3, 100, 50, 0.01, 256, 1000, 50, 0.01)

SETTINGS: dict[str, Setting] = {
    "digits": Setting(32, 3, 5, 6, 0.05, 64, 200, 6, 0.01),
    "fashion-mnist": Setting(64, 3, 6, 1, 0.02, 256, 200, 1, 0.01),
    "cifar10": _PAPERS,
    "cifar100": _PAPERS,
    "image-folder": replace(_PAPERS, batch_train=32),  # or an epoch of a few hundred pictures has a step or two
}


# channels, classes and pixels a side of the sets' images as they are read; an image folder's are the user's
SHAPES = {
    "digits": (1, 10, 16),
    "fashion-mnist": (1, 10, 28),
    "cifar10": (3, 10, 32),
    "cifar100": (3, 100, 32),
    "image-folder": (3, 10, 32),
}


def convnet(dataset: Dataset, width: int, depth: int) -> ConvNet:
    return ConvNet(dataset.channels, dataset.num_classes, width, depth, dataset.image_size)


def value_of(argv: list[str], flag: str) -> str | None:
    """What ``argv`` says to ``flag`` last, before it is parsed in earnest."""
    found = None
    for i, part in enumerate(argv):
        if part.startswith(f"{flag}="):
            found = part.removeprefix(f"{flag}=")
        elif part == flag and i + 1 < len(argv):
            found = argv[i + 1]
    return found


def dataset_of(argv: list[str], names: Any = DatasetName) -> str:
    """The data set that ``argv`` names, "digits" where it names none; ValueError for one that there is not."""
    dataset = value_of(argv, "--dataset") or "digits"
    if dataset not in get_args(names):
        raise ValueError(f"--dataset: expected one of {', '.join(get_args(names))}, got {dataset!r}")
    return dataset


class _Options(Protocol):
    dataset: str
    root: Path | None
    image_size: int | None
    device: str
    zca: bool


def load_for(options: _Options) -> Dataset:
    """The data set that a command names, where and as it wants it."""
    dataset = load(options.dataset, options.root, image_size=options.image_size)
    return (dataset.whitened() if options.zca else dataset).to(device_of(options.device))
