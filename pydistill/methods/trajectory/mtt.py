"""MTT: dataset distillation by matching training trajectories.

Cazenavette, Wang, Torralba, Efros, Zhu, "Dataset Distillation by Matching Training Trajectories", CVPR 2022. Each
iteration draws an expert and one of its first epochs, trains a student from there on the synthetic images for
``syn_steps`` steps, and moves the images and the student's learning rate down the gradient of the distance between
where the student ends and where the expert stood ``expert_epochs`` epochs later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydistill.methods.config import PHOTOGRAPHS
from pydistill.methods.trajectory.matching import SMALL, Matching


def _row(steps: int, epochs: int, last: int, lr_img: float, lr_lr: float, **more: Any) -> dict[str, Any]:
    names = ("syn_steps", "expert_epochs", "max_start_epoch", "lr_img", "lr_lr")
    return dict(zip(names, (steps, epochs, last, lr_img, lr_lr), strict=True)) | {"augment": PHOTOGRAPHS} | more


@dataclass(frozen=True)
class MTT(Matching):
    """The paper's hyper-parameters; presets for CIFAR and Tiny ImageNet are the authors'."""

    name: ClassVar[str] = "mtt"
    about: ClassVar[str] = "match the trajectories of experts"
    paper: ClassVar[str] = "Cazenavette et al., CVPR 2022"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        **SMALL,
        "cifar10": {
            1: _row(50, 2, 2, 100.0, 1e-7, lr_teacher=0.01, zca=True),
            10: _row(30, 2, 20, 100.0, 1e-5, lr_teacher=0.001, zca=True),
            50: _row(30, 2, 40, 1000.0, 1e-5, lr_teacher=0.001),
        },
        "cifar100": {
            1: _row(20, 3, 20, 1000.0, 1e-5, zca=True),
            10: _row(20, 2, 20, 1000.0, 1e-5),
            50: _row(80, 2, 40, 1000.0, 1e-5, batch_syn=125, zca=True),
        },
        "tiny-imagenet": {
            1: _row(10, 2, 10, 1e4, 1e-4),
            10: _row(20, 2, 40, 1e4, 1e-4, batch_syn=200),
            50: _row(20, 2, 40, 1e4, 1e-4, batch_syn=300),
        },
        # for folders of hundreds as well as thousands of pictures: experts of few steps move little, and the matching
        # loss is divided by the square of that
        "image-folder": {1: _row(20, 2, 10, 100.0, 1e-6)},
    }
