"""What methods that pick real images share: a network trained on the data, and the resulting set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pydistill import __version__
from pydistill.augment import DiffAugment
from pydistill.data import Dataset, DistilledSet
from pydistill.evaluate import evaluate, train_student
from pydistill.methods.method import DatasetInputs, Inputs, Job, Method, OptionError, check_augment, check_numbers
from pydistill.methods.picture import write_picture
from pydistill.methods.settings import convnet, setting_of
from pydistill.nn.student import Student
from pydistill.ops.convnet_step import LabelKind
from pydistill.seeding import Stream, seeded_generator, seeded_net
from pydistill.trajectory.train import EVAL_BATCH

if TYPE_CHECKING:
    from typing_extensions import Self

    from pydistill.methods.runs import Run

__all__ = ["Picking", "class_members", "train_teacher"]


@dataclass(frozen=True)
class PickInputs(DatasetInputs):
    """The data set, the networks and the students."""

    width: int = 128
    """Channels of the ConvNet, for both the judging network and the students."""
    depth: int = 3
    """Blocks of the ConvNet."""
    students: int = 5
    """Fresh students for each accuracy; 0: pick only, test nothing."""
    student_epochs: int = 1000
    """Passes of a student over its images."""
    lr_student: float = 0.01
    """Learning rate of the students."""

    @classmethod
    def for_method(cls, method: Any, **given: Any) -> Self:
        setting = setting_of(given.get("dataset", "digits"))
        sizes = {name: getattr(setting, name) for name in ("width", "depth", "student_epochs", "lr_student")}
        return super().for_method(method, **sizes | given)


@dataclass(frozen=True)
class Picking(Method):
    """Options of every method that picks; ValueError for counts below 1 and shares outside (0, 1]."""

    group: ClassVar[str] = "selection"
    inputs: ClassVar[type[Inputs]] = PickInputs
    resumable: ClassVar[bool] = False
    shares: ClassVar[tuple[str, ...]] = ()

    ipc: int = 10
    """Images per class."""
    teacher_epochs: int = field(default=50, kw_only=True)
    """Passes of the judging network over the training images."""
    teacher_lr: float = field(default=0.01, kw_only=True)
    """Learning rate of the judging network."""
    teacher_batch: int = field(default=256, kw_only=True)
    """Images per step of the judging network."""
    augment: str = field(default="", kw_only=True)
    """Differentiable siamese augmentation of the students' batches, operations joined by _."""
    seed: int = field(default=0, kw_only=True)
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in self.shares and not 0 < value <= 1:
                raise ValueError(f"{f.name}: expected a share in (0, 1], got {value}")
            if f.type == "int":
                check_numbers(self, **{f.name: int(f.name != "seed")})
        check_numbers(self, teacher_lr=0.0)
        check_augment(self)

    def job(self, inputs: PickInputs, device: torch.device) -> PickJob:
        return PickJob(self, inputs, device)

    def pick(
        self, dataset: Dataset, teacher: Student, *, lr: float = 0.01, on_class: Callable[[], None] | None = None
    ) -> DistilledSet:
        """The images that the method picks, or makes from its picks; the same seed gives the same ones.

        Args:
            dataset: real images.
            teacher: a trained network, in evaluation mode.
            lr: learning rate for students.
            on_class: called after each class; an exception from it ends the selection.

        Raises:
            ValueError: the options do not fit the data set.
        """
        raise NotImplementedError

    def check(self, dataset: Dataset) -> None:
        """ValueError for options that do not fit the data set, before a network is trained on it."""
        raise NotImplementedError

    def distilled(
        self, dataset: Dataset, images: Tensor, labels: Tensor, lr: float, label_kind: LabelKind = "hard"
    ) -> DistilledSet:
        """The set, with a record of what made it."""
        settings: dict[str, Any] = {
            "method": self.name,
            "dataset": dataset.name,
            "class_names": list(dataset.class_names),
        }
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
    """The training images of each class, by index; ValueError if there are fewer than ``least``."""
    found = [(dataset.train_labels == label).nonzero()[:, 0] for label in range(dataset.num_classes)]
    for name, members in zip(dataset.class_names, found, strict=True):
        if len(members) < least:
            raise ValueError(f"{what}: expected at most {len(members)}, the training images of {name!r}, got {least}")
    return found


@torch.no_grad()
def embed(net: Student, images: Tensor, batch_size: int = 500) -> Tensor:
    """The features before the classifier, ``[N, F]``."""
    return torch.cat([net.embed(x) for x in images.split(batch_size)])


class PickJob(Job):
    """Trains the judging network, picks, and tests students on the picked and on as many random images."""

    made = ("images.png", "distilled.safetensors")

    def __init__(self, config: Picking, inputs: PickInputs, device: torch.device):
        check_numbers(inputs, OptionError, students=0, student_epochs=1, lr_student=0.0)
        self.config, self.inputs, self.device, self.dataset = config, inputs, device, inputs.load(device)
        self.title, self.results = self.dataset.name, {}
        self.dataset.sample(config.ipc)  # refuses more than there are
        config.check(self.dataset)
        self.make_net()  # refuses images that are too small

    def stored(self) -> dict[str, Any]:
        return {}

    def make_net(self) -> nn.Module:
        return convnet(self.dataset, self.inputs.width, self.inputs.depth)

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.train_judge, self.pick, self.test

    def train_judge(self, run: Run) -> None:
        config = self.config
        steps = config.teacher_epochs * -(-len(self.dataset.train_images) // config.teacher_batch)
        on_step = run.steps("judging network", steps)
        self.teacher = train_teacher(config, self.dataset, self.make_net, on_step=on_step)

    def pick(self, run: Run) -> None:
        on_class = run.steps("pick", self.dataset.num_classes)
        picked = self.config.pick(self.dataset, self.teacher, lr=self.inputs.lr_student, on_class=on_class)
        sizes = {name: getattr(self.inputs, name) for name in ("width", "depth", "student_epochs")}
        picked.config |= {**sizes, "pydistill": __version__}
        picked.save(run.folder / "distilled.safetensors")
        write_picture(run, picked, self.config.ipc)
        self.picked, self.results = picked, {"config": picked.config}

    def test(self, run: Run) -> None:
        """Accuracies of the students; every student on random images has its own draw."""
        config, inputs, dataset, picked = self.config, self.inputs, self.dataset, self.picked
        if not inputs.students:
            return
        draws = [
            dataset.sample(config.ipc, seeded_generator(config.seed, Stream.TEST_REAL_IMAGES, s))
            for s in range(inputs.students)
        ]
        images, labels = (torch.stack(each) for each in zip(*draws, strict=True))
        sets = {
            "random": (images, labels, "hard"),
            "picked": (picked.images.to(self.device), picked.labels.to(self.device), picked.label_kind),
        }
        count, epochs = len(picked.images), inputs.student_epochs
        steps = epochs * -(-count // 256) + -(-len(dataset.test_images) // EVAL_BATCH)
        for name, (x, y, kind) in sets.items():
            accuracies = evaluate(
                *(self.make_net, x, y, dataset.test_images, dataset.test_labels),
                **{"lr": inputs.lr_student, "epochs": epochs, "label_kind": kind},
                augment=DiffAugment(config.augment) if config.augment else None,
                students=range(inputs.students),
                seed=config.seed,
                on_step=run.steps(f"students on {name}", inputs.students * steps),
            )
            self.results[name] = {"accuracies": accuracies, "mean": mean(accuracies), "images": count}
            self.results[name] |= {"lr": inputs.lr_student, "epochs": epochs}
