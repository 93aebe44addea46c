"""DATM: trajectories whose difficulty matches the number of images, and learnt labels.

Guo, Wang, Cazenavette, Li, Zhang, You, "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory
Matching", ICLR 2024. Starts are drawn from a growing range of epochs; labels are logits, initially the experts';
steps whose loss stays above a threshold are skipped; images start from ones that the experts classify correctly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydistill.data import Dataset
from pydistill.methods.outer import State
from pydistill.methods.trajectory.matching import SMALL, Matching
from pydistill.methods.trajectory.mtt import _row
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule


def _grown(first: int, within: int) -> dict[str, Any]:
    return {"first_max_start_epoch": first, "expansion": within}


@dataclass(frozen=True)
class DATM(Matching):
    """MTT's hyper-parameters, and DATM's; presets of CIFAR and Tiny ImageNet are its configuration files'."""

    name: ClassVar[str] = "datm"
    about: ClassVar[str] = "MTT as difficult as the images are many, with labels that are learnt"
    paper: ClassVar[str] = "Guo et al., ICLR 2024"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        data: {ipc: row | {"lr_label": 10.0, "threshold": 2.0} for ipc, row in rows.items()}
        for data, rows in SMALL.items()
    } | {
        "cifar10": {
            1: _row(80, 2, 4, 100.0, 1e-7, lr_label=5.0, threshold=1.1, iterations=10000, zca=True),
            10: _row(80, 2, 20, 100.0, 1e-5, lr_label=2.0, batch_syn=100, iterations=10000, zca=True)
            | _grown(10, 1000),
            50: _row(80, 2, 40, 1000.0, 1e-5, lr_label=2.0, batch_syn=500, iterations=10000, zca=True),
        },
        "cifar100": {
            1: _row(40, 2, 20, 1000.0, 1e-5, lr_label=10.0, iterations=10000, zca=True),
            10: _row(80, 2, 50, 1000.0, 1e-5, lr_label=10.0, batch_syn=1000, iterations=10000, zca=True)
            | _grown(30, 2000),
            50: _row(80, 2, 70, 1000.0, 1e-5, min_start_epoch=20, lr_label=10.0, batch_syn=1000, zca=True),
        },
        "tiny-imagenet": {
            1: _row(40, 2, 20, 1e4, 1e-4, lr_label=10.0, iterations=10000, zca=True),
            10: _row(40, 2, 50, 100.0, 1e-4, min_start_epoch=10, lr_label=10.0, batch_syn=500, zca=True),
            50: _row(20, 2, 70, 100.0, 1e-4, min_start_epoch=40, lr_label=10.0, batch_syn=1000, zca=True),
        },
    }

    lr_label: float = 5.0
    """Outer learning rate of the labels' logits."""
    momentum_label: float = 0.9
    """Momentum of the labels' outer update."""
    threshold: float = 1.0
    """Segments with a larger loss are skipped."""
    first_max_start_epoch: int | None = None
    """The value of max_start_epoch at the beginning, from where it grows; by default it does not grow."""
    expansion: int = 1000
    """Iterations until max_start_epoch has grown to its value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_start_epoch < (self.first_max_start_epoch or self.max_start_epoch) <= self.max_start_epoch:
            wanted = f"more than {self.min_start_epoch} and at most {self.max_start_epoch}"
            raise ValueError(f"first_max_start_epoch: expected {wanted}, got {self.first_max_start_epoch}")

    def last_start(self, iteration: int) -> int:
        if self.first_max_start_epoch is None:
            return self.max_start_epoch
        grown = (self.max_start_epoch - self.first_max_start_epoch) * iteration // self.expansion
        return min(self.first_max_start_epoch + grown, self.max_start_epoch)

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        """Images that the first expert gets right, and the mean logits of the experts that get them right."""
        flat, last = FlatModule(net), self.max_start_epoch - 1 + self.expert_epochs
        thetas = [experts.segment(e, 0, last)[1].to(dataset.train_images.device) for e in range(experts.shape[0])]
        with torch.no_grad():
            predicted = torch.cat([flat(thetas[0], x).argmax(1) for x in dataset.train_images.split(500)])
        right = predicted == dataset.train_labels
        images, labels = dataset.sample(self.ipc, seeded_generator(self.seed, Stream.SYNTHETIC), preferred=right)
        with torch.no_grad():
            logits = torch.stack([flat(theta, images) for theta in thetas])  # [E, N, K]
        agrees = (logits.argmax(2) == labels).to(logits.dtype)[..., None]
        agrees = torch.where(agrees.sum(0) > 0, agrees, 1.0)  # an image that no expert gets right: all of them
        lr = images.new_tensor(self.lr_teacher)
        return State({"images": images, "labels": (logits * agrees).sum(0) / agrees.sum(0), "lr": lr}, "logits")

    def counts(self, losses: Tensor) -> Tensor:
        return (losses <= self.threshold).to(losses.dtype)

    def update(self, state: State, grads: dict[str, Tensor]) -> None:
        super().update(state, grads)
        state.descend("labels", grads["labels"], self.lr_label, self.momentum_label)
