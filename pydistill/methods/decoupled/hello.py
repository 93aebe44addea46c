"""HeLlO (Yu et al., ICCV 2025): soft labels are made online by a fitted projector, and none are stored.

    fit     mean over weak teachers of mse(f_m(x), teacher_m(x)) + ce_weight cross_entropy(f_m(x), y), on real images
    images  those of each class that the teachers find easiest, then some steps on `feature_distance`
    student mse(student(a(x)), f(a(x))) + beta cross_entropy(student(a(x)), y), with f the teachers' mean

There is no published code. The paper's encoder is CLIP, its head the embeddings of the classes' names, its teachers
nine ResNet-18s and its images mosaics of patches (RDED). Here the encoder is any module, by default one trained by
Barlow Twins on the set; the head starts at the classes' mean features; teachers are ConvNets; images are whole ones.
The baseline: the same teachers' logits at the same augmented views, stored as float16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import DiffAugment
from pydistill.data import Dataset
from pydistill.evaluate import accuracy, train_student
from pydistill.labels import Projector, feature_distance
from pydistill.methods.method import DatasetInputs, Inputs, Job, Method, OptionError, check_numbers
from pydistill.methods.networks.self_supervised import Encoder, barlow_twins, check_batch
from pydistill.methods.settings import convnet, setting_of
from pydistill.methods.training import Batches, half_cosine, train
from pydistill.seeding import Stream, seeded_generator, seeded_net, torch_seeded

__all__ = [
    "HeLlO",
    "body_of",
    "class_means",
    "easiest",
    "fit_projector",
    "post_train",
    "shrink_proof",
    "stored_labels",
    "views",
]

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

OnStep = Callable[[], None] | None
_FILES = {"projector": "projector", "encoder": "encoder", "stored": "labels"}


@dataclass(frozen=True)
class HeLlO(Method):
    """HeLlO's hyper-parameters; `preset` has the values for a data set."""

    name: ClassVar[str] = "hello"
    about: ClassVar[str] = "HeLlO: images, and soft labels from a fitted projector"
    paper: ClassVar[str] = "Yu et al., ICCV 2025"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {},
        "fashion-mnist": {"encoder_epochs": 2, "teacher_epochs": 1, "fit_epochs": 2, "batch_size": 100},
    }
    inputs: ClassVar[type[Inputs]] = DatasetInputs

    ipc: int = 10
    """Images per class."""
    encoder_epochs: int = 30
    """Passes of the self-supervised encoder over the training images."""
    encoder_width: int = 16
    """Channels of the encoder's first block; it has three."""
    teachers: int = 2
    """Number of weak teachers."""
    teacher_epochs: int = 10
    """Passes of each teacher over the training images."""
    rank: int = 2
    """Rank of the encoder's factors."""
    head_rank: int = 8
    """Rank of the head's factors."""
    fit_epochs: int = 30
    """Passes of the projector over the training images."""
    ce_weight: float = 1.0
    """Weight of the cross entropy in fitting the projector."""
    image_steps: int = 20
    """Steps on the images so that they keep their features at half the size."""
    student_epochs: int = 200
    """Passes of a student over the distilled images, each in other views."""
    beta: float = 0.1
    """Weight of the cross entropy in training a student."""
    lr: float = 2e-3
    """Peak learning rate of Adam, for projector and students."""
    batch_size: int = 100
    """Images per step."""
    students: int = 3
    """Fresh students for each accuracy."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        counts = ("ipc", "teachers", "rank", "head_rank", "fit_epochs", "student_epochs", "batch_size", "students")
        more = ("encoder_width", "teacher_epochs")
        weights = ("ce_weight", "beta", "image_steps", "encoder_epochs", "seed")
        check_numbers(self, **dict.fromkeys((*counts, *more), 1), **dict.fromkeys(weights, 0), lr=0.0)

    def job(self, inputs: DatasetInputs, device: torch.device) -> HeLlOJob:
        return HeLlOJob(self, inputs, device)

    def encoder(self, channels: int, image_size: int) -> Encoder:
        return Encoder(channels, 1, self.encoder_width, 3, image_size)

    def projector(self, encoder: Encoder, class_embeddings: Tensor) -> Projector:
        options = {"rank": self.rank, "head_rank": self.head_rank, "teachers": self.teachers}
        with torch_seeded(seeded_generator(self.seed, Stream.PROJECTOR)):
            return Projector(body_of(encoder), class_embeddings, **options)


def body_of(encoder: Encoder) -> nn.Module:
    """The encoder up to its pooled features, as a module that shares its parameters."""
    return nn.Sequential(encoder.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Stand-ins for the classes' names: class means minus the overall mean, orthogonal to it, ``[K, d]``.

    Orthogonal, since what all features have in common would favour one class.
    """
    mean = features.mean(0)
    means = torch.stack([features[labels == k].mean(0) for k in range(num_classes)]) - mean
    return means - (means @ mean)[:, None] * mean / mean.square().sum().clamp_min(1e-12)


def views(images: Tensor, seed: int, epoch: int) -> Tensor:
    """The images of an epoch of post-training: augmented one by one, depending on ``(seed, epoch)`` alone."""
    augment = DiffAugment("color_crop_cutout_scale_rotate")
    return augment(images, augment.draw(images.shape, seeded_generator(seed, Stream.VIEWS, epoch)))


def fit_projector(
    config: HeLlO,
    projector: Projector,
    teachers: list[nn.Module],
    images: Tensor,
    labels: Tensor,
    on_step: OnStep = None,
) -> list[float]:
    """Fits the projector's factors in place, on augmented images, by Adam under half a cosine; each epoch's mean loss.

    Raises:
        ValueError: not as many teachers as the projector has heads for.
        FloatingPointError: the loss is not finite.
    """
    if len(teachers) != projector.config["teachers"]:
        raise ValueError(f"teachers: expected {projector.config['teachers']} as the projector has, got {len(teachers)}")
    optimizer = torch.optim.Adam(projector.factors().values(), config.lr)
    augment = DiffAugment("color_crop_cutout_scale_rotate")
    generator = seeded_generator(config.seed, Stream.FIT_BATCHES)
    for teacher in teachers:
        teacher.eval()

    def loss(index: Tensor) -> Tensor:
        x = images[index]
        x = augment(x, augment.draw(x.shape, generator))
        with torch.no_grad():
            targets = torch.stack([teacher(x) for teacher in teachers])
        return projector.loss(x, targets, labels[index], config.ce_weight)

    def batches(epoch: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        order = to_device(torch.randperm(len(images), generator=generator, device="cpu"), images.device)
        for index in order.split(config.batch_size):
            yield len(index), partial(loss, index)

    return _trained(config, projector, optimizer, batches, len(images), config.fit_epochs, on_step)


@torch.no_grad()
def easiest(teachers: list[nn.Module], images: Tensor, labels: Tensor, ipc: int, num_classes: int) -> Tensor:
    """The indices of the ``ipc`` images of each class with the least cross entropy, averaged over the teachers.

    Raises:
        ValueError: a class has fewer images.
    """
    logits = [torch.cat([teacher.eval()(part) for part in images.split(500)]) for teacher in teachers]
    scores = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits]).mean(0)
    chosen = []
    for k in range(num_classes):
        members = (labels == k).nonzero()[:, 0]
        if len(members) < ipc:
            raise ValueError(f"ipc: expected at most {len(members)}, the images of class {k}, got {ipc}")
        chosen.append(members[scores[members].argsort(stable=True)[:ipc]])
    return torch.cat(chosen)


def shrink_proof(config: HeLlO, encoder: nn.Module, images: Tensor) -> Tensor:
    """``images`` after ``image_steps`` steps of Adam on their `feature_distance` at half the size."""
    x = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.01)
    for _ in range(config.image_steps):
        half = (x.shape[2] // 2, x.shape[3] // 2)
        (x.grad,) = torch.autograd.grad(feature_distance(encoder, x, half), x)
        optimizer.step()
    return x.detach()


@torch.no_grad()
def stored_labels(config: HeLlO, teachers: list[nn.Module], images: Tensor) -> Tensor:
    """What relabelling would store: the teachers' mean logits at every epoch's views, float16 ``[epochs, n, K]``."""
    epochs = (views(images, config.seed, epoch) for epoch in range(config.student_epochs))
    return torch.stack([torch.stack([teacher.eval()(x) for teacher in teachers]).mean(0).half() for x in epochs])


def post_train(
    config: HeLlO,
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    source: Projector | Tensor | None,
    number: int,
    on_step: OnStep = None,
) -> None:
    """Trains student ``number`` in place by Adam under half a cosine.

    Args:
        source: of the soft labels: a projector, which makes them online, the result of `stored_labels`, or None for
            the hard labels alone.
    """
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), config.lr)

    def loss(epoch: int, x: Tensor, index: Tensor) -> Tensor:
        found = net(x)
        hard = F.cross_entropy(found, labels[index])
        if source is None:
            return hard
        with torch.no_grad():
            soft = source(x) if isinstance(source, Projector) else source[epoch][index]
        return F.mse_loss(found, soft.to(found.dtype)) + config.beta * hard

    def batches(epoch: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        shown = views(images, config.seed, epoch)
        generator = seeded_generator(config.seed, Stream.STUDENT_BATCHES, number, epoch)
        order = to_device(torch.randperm(len(images), generator=generator, device="cpu"), images.device)
        for index in order.split(config.batch_size):
            yield len(index), partial(loss, epoch, shown[index], index)

    _trained(config, net, optimizer, batches, len(images), config.student_epochs, on_step)


def _trained(
    config: HeLlO,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    count: int,
    epochs: int,
    on_step: OnStep,
) -> list[float]:
    """Trains at a learning rate that falls from epoch to epoch; returns each epoch's mean loss."""
    steps = -(-count // config.batch_size)
    rate = lambda lr, epoch, step: lr * half_cosine(epoch, epochs)  # noqa: E731
    return train(net, optimizer, batches, epochs=epochs, steps=steps, rate=rate, on_step=on_step)


class HeLlOJob(Job):
    """Fits a label projector and trains students on labels that it makes online; and others on stored and hard ones.

    encoder.safetensors takes the place of a public one; the run leaves teachers.safetensors, projector.safetensors,
    images.safetensors (x and y), labels.safetensors (the stored labels, for comparison), and bytes and accuracies.
    """

    made = ("projector.safetensors",)
    data: Dataset

    def __init__(self, config: HeLlO, inputs: DatasetInputs, device: torch.device):
        self.config, self.inputs, self.device = config, inputs, device
        self.data, self.setting = inputs.load(device), setting_of(inputs.dataset)
        self.title, self.results = self.data.name, {}
        data = self.data
        check_batch(data.train_images)
        least = int(data.train_labels.bincount(minlength=data.num_classes).min())
        if config.ipc > least:
            raise OptionError("ipc", f"expected at most {least}, the images of the smallest class, got {config.ipc}")
        # both refuse images that are too small
        self.encoder = seeded_net(
            lambda: config.encoder(data.channels, data.image_size), config.seed, Stream.ENCODER, device=device
        )
        self.teachers = [self._convnet(Stream.PROJECTED_TEACHER, number) for number in range(config.teachers)]

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        return False  # students are trained again

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.train_encoder, self.train_teachers, self.fit, self.choose_images, self.store_labels, self.test

    def train_encoder(self, run: Run) -> None:
        config, images = self.config, self.data.train_images

        def make() -> dict[str, Tensor]:
            barlow_twins(self.encoder, images, epochs=config.encoder_epochs, seed=config.seed, on_step=run.stop)
            return self.encoder.state_dict()

        self.encoder.load_state_dict(run.kept("encoder.safetensors", make))
        self.encoder.eval()

    def train_teachers(self, run: Run) -> None:
        def make() -> dict[str, Tensor]:
            state: dict[str, Tensor] = {}
            for number, teacher in enumerate(self.teachers):
                train_student(
                    *(teacher, self.data.train_images, self.data.train_labels),
                    lr=self.setting.lr_student,
                    epochs=self.config.teacher_epochs,
                    batch_size=self.setting.batch_train,
                    generator=seeded_generator(self.config.seed, Stream.PROJECTED_TEACHER_BATCHES, number),
                    on_step=run.stop,
                )
                state |= {f"{number}.{name}": value for name, value in teacher.state_dict().items()}
            return state

        found = run.kept("teachers.safetensors", make)
        for number, teacher in enumerate(self.teachers):
            teacher.load_state_dict({name: found[f"{number}.{name}"] for name in teacher.state_dict()})
            teacher.eval()

    def fit(self, run: Run) -> None:
        data, path = self.data, run.folder / "projector.safetensors"
        if not path.exists():
            began = time.monotonic()
            with torch.no_grad():
                features = torch.cat([self.encoder.pooled(part) for part in data.train_images.split(500)])
            means = class_means(features, data.train_labels, data.num_classes)
            projector = self.config.projector(self.encoder, means)
            fit_projector(self.config, projector, self.teachers, data.train_images, data.train_labels, run.stop)
            projector.save(path)
            run.tell(f"projector: {time.monotonic() - began:.0f} s")
        self.projector = Projector.load(path, body_of(self.encoder))

    def choose_images(self, run: Run) -> None:
        config, data = self.config, self.data

        def make() -> dict[str, Tensor]:
            index = easiest(self.teachers, data.train_images, data.train_labels, config.ipc, data.num_classes)
            x = shrink_proof(config, self.projector.encoder, data.train_images[index])
            return {"x": x, "y": data.train_labels[index]}

        chosen = run.kept("images.safetensors", make)
        self.images, self.labels = (chosen[name].to(self.device) for name in "xy")

    def store_labels(self, run: Run) -> None:
        def make() -> dict[str, Tensor]:
            return {"labels": stored_labels(self.config, self.teachers, self.images)}

        self.soft = run.kept("labels.safetensors", make)["labels"].to(self.device)
        run.stop()

    def test(self, run: Run) -> None:
        config, test = self.config, (self.data.test_images, self.data.test_labels)
        self.results = {
            "bytes": {name: (run.folder / f"{file}.safetensors").stat().st_size for name, file in _FILES.items()},
            "teachers": [accuracy(teacher, *test) for teacher in self.teachers],
            "labeller": accuracy(self.projector, *test),
        }
        for name, source in {"hard": None, "stored": self.soft, "projector": self.projector}.items():
            self.results[name] = []
            for student in range(config.students):
                net = self._convnet(Stream.PROJECTED_STUDENT, student)
                post_train(config, net, self.images, self.labels, source, student, run.stop)
                self.results[name].append(accuracy(net, *test))
                run.log({"labels": name, "student": student, "accuracy": self.results[name][-1]})

    def _convnet(self, stream: Stream, number: int) -> nn.Module:
        setting, data = self.setting, self.data
        return seeded_net(
            lambda: convnet(data, setting.width, setting.depth), self.config.seed, stream, number, device=self.device
        )
