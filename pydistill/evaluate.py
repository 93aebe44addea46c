"""How good a small training set is: the accuracy of fresh students trained on it.

The protocol is the one the distillation papers share (Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient
Matching", ICLR 2021): SGD with momentum 0.9 and weight decay 5e-4, the learning rate divided by ten after half of the
epochs, several students from different initialisations, mean and deviation of their test accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._on_demand import OnDemand
from pydistill.data.streamed import StreamedImages
from pydistill.ops.convnet_step import LabelKind
from pydistill.seeding import Stream, seeded_generator, seeded_net
from pydistill.trajectory import FlatModule, train_students
from pydistill.trajectory.recognition import trains_at_once
from pydistill.trajectory.train import EVAL_BATCH

__all__ = ["accuracy", "evaluate", "linear_probe", "train_student"]


def accuracy(
    net: nn.Module,
    images: Tensor | StreamedImages,
    labels: Tensor,
    *,
    batch_size: int = EVAL_BATCH,
    on_step: Callable[[], None] | None = None,
) -> float:
    """The share, in ``[0, 1]``, of ``images`` ``[M, C, H, W]`` that ``net`` classifies as ``labels`` ``[M]``.

    Raises:
        ValueError: there are no images, or not as many labels.
    """
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape [{len(images)}] with an image or more, got {list(labels.shape)}")
    training = net.training
    net.eval()
    correct = 0
    with torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((net(x).argmax(1) == y).sum())
            if on_step is not None:
                on_step()
    net.train(training)
    return correct / len(images)


def train_student(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 256,
    label_kind: Literal["hard", "logits", "probs"] = "hard",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    augment: Any = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Trains ``net`` in place by SGD on the cross-entropy: one student of `pydistill.train_students`.

    After ``ceil(epochs / 2)`` epochs the learning rate falls to a tenth and the momentum is reset, as in the papers'
    code. Checking for non-finite losses is up to the caller. ``net`` receives its parameters and buffers at the end of
    the training, and is left in training mode; after an exception it is unchanged.

    Args:
        net: gives logits ``[B, K]``.
        images: float32 ``[N, C, H, W]``.
        labels: int64 ``[N]``, or float ``[N, K]`` logits or probabilities.
        lr: learning rate, positive.
        epochs: passes over the images.
        batch_size: images per step, drawn without replacement in each pass.
        label_kind: what ``labels`` are.
        momentum: of SGD.
        weight_decay: of SGD, coupled.
        augment: None, or an object with ``draw(shape, generator) -> record`` and ``__call__(images, record)``.
        generator: for the order of the images and the augmentation, on the CPU; the global one by default.
        on_step: called after each step; an exception from it ends the training.

    Raises:
        TypeError, ValueError: as `pydistill.train_students` does.
    """
    if not len(images) or len(labels) != len(images):
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
    trained = train_students(
        net,
        FlatModule(net).parameters()[None],
        images,
        labels,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        label_kind=label_kind,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule="step",
        augment=augment,
        generator=generator,
        check_finite=False,
        on_step=on_step,
    )
    trained.copy_into(net, 0)
    net.train()


def evaluate(
    make_net: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 256,
    label_kind: LabelKind = "hard",
    augment: Callable[..., Tensor] | None = None,
    students: Sequence[int] = range(5),
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
    **options: Any,
) -> list[float]:
    """Trains fresh students on ``(images, labels)`` and returns their test accuracies, each in ``[0, 1]``.

    Students that `pydistill.train_students` can train at once are trained at once.

    Args:
        make_net: builds a network that gives logits ``[B, K]``; the networks built are left trained.
        images: float32 ``[N, C, H, W]`` (or `StreamedImages`) to train on, or one set per student,
            ``[len(students), N, C, H, W]``; the work is done on their device.
        labels: int64 ``[N]`` or, with ``label_kind``, float ``[N, K]``; with ``[len(students)]`` in front if the images
            have it.
        test_images: float32 ``[M, C, H, W]``, or `StreamedImages`.
        test_labels: int64 ``[M]``.
        lr: learning rate; for a distilled set, the one learnt along with it.
        epochs: passes of each student over its images.
        batch_size: images per step.
        label_kind: what ``labels`` holds: "hard", "logits" or "probs".
        augment: of each batch, as for `pydistill.train_students`.
        students: numbers of the students; student ``s``'s initialisation and order of images depend on ``(seed, s)``
            alone. (The last bits of its results also depend on how many are trained at once.)
        seed: see ``students``.
        on_step: called after each training step and test batch of each student; an exception from it ends the
            evaluation.
        options: further arguments of `pydistill.train_students`; by default momentum, weight decay and schedule are the
            protocol's, and non-finite losses do not raise.

    Raises:
        TypeError, ValueError: as `pydistill.train_students` does.
    """
    tensors = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    for name, tensor in tensors.items():
        if not isinstance(tensor, (Tensor, OnDemand) if name.endswith("images") else Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not isinstance(students, Sequence) or not all(isinstance(student, int) for student in students):
        raise TypeError(f"students: expected their numbers, such as range(5), got {students!r}")
    if not len(test_images) or test_labels.shape != test_images.shape[:1]:
        wanted = f"[{len(test_images)}] with an image or more"
        raise ValueError(f"test_labels: expected shape {wanted}, got {list(test_labels.shape)}")
    own = images.dim() == 5
    if own and not len(images) == len(labels) == len(students):
        wanted = f"those of {len(students)} students"
        raise ValueError(f"images, labels: expected {wanted}, got {len(images)} and {len(labels)}")
    nets = [seeded_net(make_net, seed, Stream.TEST_STUDENT, student, device=images.device) for student in students]
    generators = [seeded_generator(seed, Stream.TEST_STUDENT_BATCHES, student) for student in students]
    at_once = len(nets) if nets and trains_at_once(nets[0], images) else 1
    protocol: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "step", "check_finite": False}
    accuracies: list[float] = []
    for start in range(0, len(nets), at_once):
        group = slice(start, start + at_once)
        trained = train_students(
            nets[start],
            torch.stack([FlatModule(net).parameters() for net in nets[group]]),
            images[group] if own else images,
            labels[group] if own else labels,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            label_kind=label_kind,
            augment=augment,
            generator=generators[group],
            eval_data=(test_images, test_labels),
            on_step=on_step,
            **(protocol | options),
        )
        for e, net in enumerate(nets[group]):
            trained.copy_into(net, e)
        assert trained.accuracy is not None  # as there are data to evaluate on
        accuracies += trained.accuracy.tolist()
    return accuracies


def linear_probe(
    net: Any, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, *, decay: float = 1e-3
) -> float:
    """Accuracy in [0, 1] of a logistic regression, by L-BFGS, on a network's frozen, standardised features.

    ``net.embed`` gives the features ``[N, F]`` of images ``[N, C, H, W]``; ``decay`` is that of the weights.
    """

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return torch.cat([net.embed(part) for part in x.split(500)]).double()

    train, test = features(images), features(test_images)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, train.shape[1] + 1, dtype=torch.float64, device=train.device)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def logits(x: Tensor) -> Tensor:
        return x @ weight[:, :-1].T + weight[:, -1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(train), labels) + decay * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float((logits(test).argmax(1) == test_labels).double().mean())
