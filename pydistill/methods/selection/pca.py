"""PCA (Xiao and He, "Rethinking Large-scale Dataset Compression", 2025): prune, combine and augment real images.

Prune: a trained network scores the training images, and the best of each class stay. Combine: the crop of each that the
network is surest of is shrunk to a fraction of the size, and factor * factor of them make one image. Augment: students
see the images augmented, with their hard labels, or with the network's logits for them, which the paper argues against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pydistill.data import Dataset, DistilledSet
from pydistill.methods.selection.picking import Picking, class_members
from pydistill.nn.student import Student
from pydistill.seeding import Stream, seeded_generator
from pydistill.select import best_crops, mosaic, sample_scores

__all__ = ["PCA", "combine"]


@dataclass(frozen=True)
class PCA(Picking):
    """PCA's options; `preset` has the values for a data set."""

    name: ClassVar[str] = "pca"
    about: ClassVar[str] = "PCA: crops of hard images, put together"
    paper: ClassVar[str] = "Xiao and He, 2025"
    shares: ClassVar[tuple[str, ...]] = ("prune", "least_area")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"teacher_epochs": 6, "teacher_lr": 0.05, "teacher_batch": 64},
        "fashion-mnist": {"teacher_epochs": 2, "teacher_lr": 0.02, "teacher_batch": 128, "prune": 0.05},
    }

    score: Literal["ce", "el2n", "margin"] = "el2n"
    """Score by which images are pruned, see `pydistill.select.sample_scores`."""
    hard: bool = False
    """Keep the hardest images, otherwise the easiest, which is better for few images."""
    prune: float = 0.5
    """Share of each class to keep; the images needed are drawn from it."""
    factor: int = 1
    """Images per row of a combined one."""
    crops: int = 5
    """Crops per image, of which the surest is taken."""
    least_area: float = 0.5
    """Least area of a crop, as a share of the image."""
    soft_labels: bool = False
    """Use the network's logits for the combined images instead of their classes."""

    def pick(self, dataset: Dataset, teacher: Student, **options: Any) -> DistilledSet:
        return combine(self, dataset, teacher, **options)

    def check(self, dataset: Dataset) -> None:
        self._members(dataset)
        height, width = dataset.train_images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor: expected a divisor of {height} and {width}, got {self.factor}")

    def _members(self, dataset: Dataset) -> list[Tensor]:
        return class_members(dataset, self.ipc * self.factor**2, "ipc * factor^2")


def combine(config: PCA, dataset: Dataset, teacher: Student, *, lr: float = 0.01, on_class: Any = None) -> DistilledSet:
    """The images that PCA makes of each class; the same seed gives the same ones.

    Args:
        config: the options.
        dataset: real images.
        teacher: a trained network, in evaluation mode.
        lr: learning rate for students.
        on_class: called after each class; an exception from it ends the selection.

    Raises:
        ValueError: a class has too few images, or the factor does not divide the images.
    """
    config.check(dataset)
    need = config.ipc * config.factor**2
    made, labels = [], []
    for label, members in enumerate(config._members(dataset)):
        with torch.no_grad():
            logits = torch.cat([teacher(x) for x in dataset.train_images[members].split(500)])
        found = sample_scores(logits, dataset.train_labels[members], [config.score])[config.score]
        hardest_last = config.score != "margin"
        stay = found.argsort(descending=config.hard == hardest_last, stable=True)[
            : max(need, round(config.prune * len(members)))
        ]
        generator = seeded_generator(config.seed, Stream.COMBINED, label)
        drawn = members[stay[torch.randperm(len(stay), generator=generator, device="cpu")[:need].to(stay.device)]]
        patches, _ = best_crops(
            teacher,
            dataset.train_images[drawn],
            dataset.train_labels[drawn],
            crops=config.crops,
            least_area=config.least_area,
            factor=config.factor,
            generator=generator,
        )
        made.append(mosaic(patches, config.factor))
        labels.append(torch.full((config.ipc,), label, device=members.device))
        if on_class is not None:
            on_class()
    images = torch.cat(made)
    if config.soft_labels:
        with torch.no_grad():
            soft = torch.cat([teacher(x) for x in images.split(500)])
        return config.distilled(dataset, images, soft, lr, "logits")
    return config.distilled(dataset, images, torch.cat(labels), lr)
