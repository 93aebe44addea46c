"""What the methods that pick real images share: a network that has seen the data, and the set that comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pydistill.augment import DiffAugment
from pydistill.data import Dataset, DistilledSet
from pydistill.evaluate import train_student
from pydistill.methods.options import check_numbers
from pydistill.nn.student import Student
from pydistill.seeding import Stream, seeded_generator, seeded_net

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Picking", "class_members", "train_teacher"]


@dataclass(frozen=True)
class Picking:
    """Options of every method that picks; ValueError for counts below 1 and shares outside (0, 1]."""

    name: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # by data set
    shares: ClassVar[tuple[str, ...]] = ()

    ipc: int = 10
    """Images per class."""
    teacher_epochs: int = field(default=50, kw_only=True)
    """Passes over the training images of the network that judges them."""
    teacher_lr: float = field(default=0.01, kw_only=True)
    """Its learning rate."""
    teacher_batch: int = field(default=256, kw_only=True)
    """Its images per step."""
    augment: str = field(default="", kw_only=True)
    """Differentiable siamese augmentation of the students' batches, operations joined by _."""
    seed: int = field(default=0, kw_only=True)
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in self.shares and not 0 < value <= 1:
                raise ValueError(f"{f.name}: expected a share in (0, 1], got {value}")
            if f.type == "int":
                check_numbers(self, **{f.name: int(f.name != "seed")})
        check_numbers(self, teacher_lr=0.0)
        DiffAugment(self.augment)  # raises for an unknown operation

    @classmethod
    def preset(cls, dataset: str, **given: Any) -> Self:
        """The values for a data set; the defaults for one without a preset."""
        return cls(**cls.presets.get(dataset, {}) | given)

    def check(self, dataset: Dataset) -> None:
        """ValueError for options that do not fit the data set, before a network is trained on it."""
        raise NotImplementedError

    def distilled(
        self, dataset: Dataset, images: Tensor, labels: Tensor, lr: float, label_kind: str = "hard"
    ) -> DistilledSet:
        """The set with what made it."""
        settings = {"method": self.name, "dataset": dataset.name, "class_names": list(dataset.class_names)}
        settings |= {**asdict(self), "flip_batch": False}
        images, labels = images.detach().cpu(), labels.detach().cpu()
        return DistilledSet(images, labels, lr, dataset.mean, dataset.std, settings, label_kind, dataset.zca)


def train_teacher(
    config: Picking, dataset: Dataset, make_net: Callable[[], nn.Module], on_step: Callable[[], None] | None = None
) -> nn.Module:
    """A network trained on all real images, in evaluation mode; ``on_step`` is called after each step."""
    net = seeded_net(make_net, config.seed, Stream.PICKING, device=dataset.train_images.device)
    if not isinstance(net, Student):
        raise ValueError(
            f"make_net: expected a network of pydistill.nn with embed and classifier, got {type(net).__name__}"
        )
    train_student(
        *(net, dataset.train_images, dataset.train_labels),
        lr=config.teacher_lr,
        epochs=config.teacher_epochs,
        batch_size=config.teacher_batch,
        generator=seeded_generator(config.seed, Stream.PICKING),
        on_step=on_step,
    )
    return net.eval()


def class_members(dataset: Dataset, least: int, what: str) -> list[Tensor]:
    """The training images of each class, by index; ValueError where there are fewer than ``least``."""
    found = [(dataset.train_labels == label).nonzero()[:, 0] for label in range(dataset.num_classes)]
    for name, members in zip(dataset.class_names, found, strict=True):
        if len(members) < least:
            raise ValueError(f"{what}: expected at most {len(members)}, the training images of {name!r}, got {least}")
    return found


@torch.no_grad()
def embed(net: Student, images: Tensor, batch_size: int = 500) -> Tensor:
    """The features before the classifier, ``[N, F]``."""
    return torch.cat([net.embed(x) for x in images.split(batch_size)])
