"""What is shared by methods that match real and synthetic images class by class, on networks drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pydistill._devices import once, to_device
from pydistill.augment import DiffAugment
from pydistill.data import Dataset
from pydistill.methods.config import Config
from pydistill.methods.outer import State
from pydistill.methods.ranks import world
from pydistill.seeding import Stream, seeded_generator


class Pairs(NamedTuple):
    """Real and synthetic images of some classes, class by class, augmented alike within each."""

    real: Tensor  # [N, C, H, W]
    synthetic: Tensor  # [n, C, H, W]
    labels_real: Tensor  # [N], on the CPU
    labels_synthetic: Tensor  # [n], on the CPU


@dataclass(frozen=True)
class ClassPairs(Config):
    """Hyper-parameters under the names of the authors' code."""

    student_lr: ClassVar[str] = "lr_net"
    streams: ClassVar[bool] = True

    batch_real: int = 256
    """Real images of each class in an iteration, or all there are if fewer."""
    lr_img: float = 1.0
    """Outer learning rate of the images."""
    momentum: float = 0.5
    """Momentum of the images' update."""
    lr_net: float = 0.01
    """Learning rate of students on the result."""
    start: Literal["noise", "real"] = "real"
    """What the synthetic images are at first: noise, or real images."""

    def check(self, dataset: Dataset, net: nn.Module, experts: Any) -> None:
        if world()[1] > dataset.num_classes:
            raise ValueError(f"{self.name}: expected a class for each of {world()[1]} ranks, got {dataset.num_classes}")

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        images, labels = self.first_images(dataset, self.start)
        return State({"images": images, "labels": labels, "lr": images.new_tensor(self.lr_net)})

    def own_classes(self, dataset: Dataset) -> list[int]:
        """This rank's classes: the ranks share them."""
        rank, ranks = world()
        return list(range(rank, dataset.num_classes, ranks))

    def pairs(self, classes: Sequence[int], images: Tensor, dataset: Dataset, *key: int) -> Pairs:
        """A batch of real images and the synthetic ones of each class; a draw depends on the key and the class alone.

        One augmentation is drawn for all images of a class. With `flips`, synthetic images are joined by their mirror
        images.
        """
        indices, records, augment = [], [], self.augmentation()
        members = once(by_class, dataset.train_labels)
        for k in classes:
            generator = seeded_generator(self.seed, Stream.OUTER_STEP, *key, k)
            own = members[k] if k < len(members) else torch.empty(0, dtype=torch.int64, device="cpu")
            indices.append(own[torch.randperm(len(own), generator=generator, device="cpu")[: self.batch_real]])
            if augment is not None:
                records.append(DiffAugment(self.augment).draw((1, *images.shape[1:]), generator))
        real = dataset.train_images[to_device(torch.cat(indices), images.device)]
        synthetic = torch.cat([images[k * self.ipc : (k + 1) * self.ipc] for k in classes])
        sizes = (
            torch.tensor([len(index) for index in indices], device="cpu"),
            torch.full((len(classes),), self.ipc, device="cpu"),
        )
        if augment is not None:
            real, synthetic = (
                apply(x, torch.cat(records).repeat_interleave(size, 0).repeat(apply.copies, 1))
                for apply, x, size in zip((DiffAugment(self.augment), augment), (real, synthetic), sizes, strict=True)
            )
        labels = [torch.tensor(classes, device="cpu").repeat_interleave(size) for size in sizes]
        return Pairs(real, synthetic, labels[0], labels[1].repeat(augment.copies if augment is not None else 1))


def by_class(labels: Tensor) -> list[Tensor]:
    """The images of each class, by their numbers, on the CPU."""
    here = labels.cpu()
    return list(here.argsort(stable=True).split(torch.bincount(here).tolist()))
