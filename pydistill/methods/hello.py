"""HeLlO (Yu et al., ICCV 2025): soft labels are made online by a fitted projector, and none is stored.

    fit     mean over weak teachers of mse(f_m(x), teacher_m(x)) + ce_weight cross_entropy(f_m(x), y), on real images
    images  those of each class that the teachers find easiest, then some steps on `feature_distance`
    student mse(student(a(x)), f(a(x))) + beta cross_entropy(student(a(x)), y), with f the teachers' mean

There is no published code. The paper's encoder is CLIP, its head the embeddings of the classes' names, its teachers
nine ResNet-18 and its images mosaics of patches (RDED). Here the encoder is any module, by default one that Barlow
Twins trained on the set; the head starts at the classes' mean features; teachers are ConvNets; images are whole ones.
What it is compared with: the same teachers' logits at the same augmented views, stored as float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.augment import DiffAugment
from pydistill.labels import Projector, feature_distance
from pydistill.methods.options import check_numbers
from pydistill.methods.self_supervised import Encoder
from pydistill.seeding import Stream, seeded_generator, torch_seeded

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

OnStep = Callable[[], None] | None


@dataclass(frozen=True)
class HeLlO:
    """What a run of HeLlO takes; `preset` has the values for a data set."""

    ipc: int = 10
    """Images of each class."""
    encoder_epochs: int = 30
    """Passes of the self-supervised encoder over the training images."""
    encoder_width: int = 16
    """Channels of the encoder's first block; it has three."""
    teachers: int = 2
    """Weak teachers."""
    teacher_epochs: int = 10
    """Passes of each over the training images."""
    rank: int = 2
    """Of the encoder's factors."""
    head_rank: int = 8
    """Of the head's factors."""
    fit_epochs: int = 30
    """Passes of the projector over the training images."""
    ce_weight: float = 1.0
    """Of the cross entropy while the projector is fitted."""
    image_steps: int = 20
    """Steps on the images that make them keep their features at half the size."""
    student_epochs: int = 200
    """Passes of a student over the distilled images, each in other views."""
    beta: float = 0.1
    """Of the cross entropy while a student is trained."""
    lr: float = 2e-3
    """Of Adam, for projector and students, at its peak."""
    batch_size: int = 100
    """Images per step."""
    students: int = 3
    """Fresh students for each accuracy."""
    seed: int = 0
    """Of all that is drawn."""

    @classmethod
    def preset(cls, dataset: str) -> HeLlO:
        """The values for "digits" and "fashion-mnist"; those of digits for others."""
        if dataset == "fashion-mnist":
            return replace(cls(), encoder_epochs=2, teacher_epochs=1, fit_epochs=2, batch_size=100)
        return cls()

    def __post_init__(self) -> None:
        counts = ("ipc", "teachers", "rank", "head_rank", "fit_epochs", "student_epochs", "batch_size", "students")
        counts += ("encoder_width", "teacher_epochs")
        weights = ("ce_weight", "beta", "image_steps", "encoder_epochs", "seed")
        check_numbers(self, **dict.fromkeys(counts, 1), **dict.fromkeys(weights, 0), lr=0.0)

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
    """In the place of the classes' names: class means less that of all, at right angles to it, ``[K, d]``.

    At right angles, since what all features have in common would favour a class.
    """
    mean = features.mean(0)
    means = torch.stack([features[labels == k].mean(0) for k in range(num_classes)]) - mean
    return means - (means @ mean)[:, None] * mean / mean.square().sum().clamp_min(1e-12)


def views(images: Tensor, seed: int, epoch: int) -> Tensor:
    """The images of an epoch of post-training: augmented one by one, by ``(seed, epoch)`` alone."""
    augment = DiffAugment("color_crop_cutout_scale_rotate")
    return augment(images, augment.draw(images.shape, seeded_generator(seed, Stream.VIEWS, epoch)).to(images.device))


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
        ValueError: not as many teachers as the projector has.
        FloatingPointError: the loss is not finite.
    """
    if len(teachers) != projector.config["teachers"]:
        raise ValueError(f"teachers: expected {projector.config['teachers']} as the projector has, got {len(teachers)}")
    optimizer = torch.optim.Adam(projector.factors().values(), config.lr)
    augment = DiffAugment("color_crop_cutout_scale_rotate")
    generator, losses = seeded_generator(config.seed, Stream.FIT_BATCHES), []
    for teacher in teachers:
        teacher.eval()
    for epoch in range(config.fit_epochs):
        optimizer.param_groups[0]["lr"] = _cosine(config.lr, epoch, config.fit_epochs)
        total = 0.0
        for index in (
            torch.randperm(len(images), generator=generator, device="cpu").to(images.device).split(config.batch_size)
        ):
            x = images[index]
            x = augment(x, augment.draw(x.shape, generator).to(x.device))
            with torch.no_grad():
                targets = torch.stack([teacher(x) for teacher in teachers])
            loss = projector.loss(x, targets, labels[index], config.ce_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index)
            if on_step is not None:
                on_step()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {total}: try a smaller lr than {config.lr}")
        losses.append(total / len(images))
    return losses


@torch.no_grad()
def easiest(teachers: list[nn.Module], images: Tensor, labels: Tensor, ipc: int, num_classes: int) -> Tensor:
    """The indices of the ``ipc`` images of each class with the least cross entropy, mean over the teachers.

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
        (x.grad,) = torch.autograd.grad(feature_distance(encoder, x, tuple(s // 2 for s in x.shape[2:])), x)
        optimizer.step()
    return x.detach()


@torch.no_grad()
def stored_labels(config: HeLlO, teachers: list[nn.Module], images: Tensor) -> Tensor:
    """What relabelling would keep: the teachers' mean logits at every epoch's views, float16 ``[epochs, n, K]``."""
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
        source: of the soft labels: a projector, which makes them online, what `stored_labels` kept, or None for the
            hard labels alone.
    """
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), config.lr)
    for epoch in range(config.student_epochs):
        optimizer.param_groups[0]["lr"] = _cosine(config.lr, epoch, config.student_epochs)
        all_views = views(images, config.seed, epoch)
        order = torch.randperm(
            len(images), generator=seeded_generator(config.seed, Stream.STUDENT_BATCHES, number, epoch), device="cpu"
        )
        for index in order.to(images.device).split(config.batch_size):
            found = net(all_views[index])
            loss = F.cross_entropy(found, labels[index])
            if source is not None:
                with torch.no_grad():
                    soft = source(all_views[index]) if isinstance(source, Projector) else source[epoch][index]
                loss = F.mse_loss(found, soft.to(found.dtype)) + config.beta * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step()


def _cosine(lr: float, epoch: int, epochs: int) -> float:
    return lr * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
