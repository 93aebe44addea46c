"""Defaults for inputs of a data set's runs, besides the method's own preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydistill.data import Dataset
from pydistill.methods.method import check_dataset
from pydistill.nn import ConvNet

__all__ = ["SETTINGS", "SHAPES", "Setting", "convnet", "setting_of"]


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
    "image-folder": replace(_PAPERS, batch_train=32),  # or a few hundred pictures give only a step or two per epoch
    # ConvNets of four blocks for 64 pixels; a pass over the whole set, 50 times for each student, only if asked for
    **{name: replace(_PAPERS, depth=4, whole_epochs=0) for name in ("tiny-imagenet", "imagenet-1k")},
}


# channels, classes and pixels a side of the sets' images as they are read; an image folder's are the user's
SHAPES = {
    "digits": (1, 10, 16),
    "fashion-mnist": (1, 10, 28),
    "cifar10": (3, 10, 32),
    "cifar100": (3, 100, 32),
    "image-folder": (3, 10, 32),
    "tiny-imagenet": (3, 200, 64),
    "imagenet-1k": (3, 1000, 224),
}


def setting_of(dataset: str) -> Setting:
    """The setting of a data set; ValueError for an unknown one."""
    check_dataset(dataset)
    return SETTINGS[dataset]


def convnet(dataset: Dataset, width: int, depth: int) -> ConvNet:
    return ConvNet(dataset.channels, dataset.num_classes, width, depth, dataset.image_size)
