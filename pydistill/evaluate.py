"""How good a small training set is: the accuracy of fresh students trained on it.

The protocol is the one the distillation papers share (Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient
Matching", ICLR 2021): SGD with momentum 0.9 and weight decay 5e-4, the learning rate divided by ten at half of the
epochs, several students from different initialisations, mean and deviation of their test accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.trajectory.experts import seeded_generator, seeded_net

__all__ = ["accuracy", "evaluate", "train_student"]


def accuracy(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 500,
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
    """Trains ``net`` in place by SGD on the cross-entropy.

    After ``ceil(epochs / 2)`` epochs the learning rate falls to a tenth and the momentum starts anew, as in the papers'
    code.

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
        generator: of the order of the images and of the augmentation, on the CPU; the global one by default.
        on_step: called after each step; an exception from it ends the training.

    Raises:
        ValueError: a count below 1, a learning rate that is not positive and finite, an unknown kind of labels, or not
            one label for each image.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: expected a positive finite number, got {lr}")
    if label_kind not in ("hard", "logits", "probs"):
        raise ValueError(f"label_kind: expected 'hard', 'logits' or 'probs', got {label_kind!r}")
    if not len(images) or len(labels) != len(images):
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
    targets = labels.softmax(1) if label_kind == "logits" else labels
    net.train()
    for epoch in range(epochs):
        if epoch in (0, (epochs + 1) // 2):
            rate = lr if epoch == 0 else lr / 10
            optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
        for index in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            x = images[index]
            if augment is not None:
                x = augment(x, augment.draw(x.shape, generator))
            optimizer.zero_grad()
            F.cross_entropy(net(x), targets[index]).backward()
            optimizer.step()
            if on_step is not None:
                on_step()


def evaluate(
    make_net: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    lr: float,
    epochs: int,
    students: Sequence[int] = range(5),
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
    **options: Any,
) -> list[float]:
    """Trains fresh students on ``(images, labels)`` and returns their test accuracies, each in ``[0, 1]``.

    Args:
        make_net: builds a network that gives logits ``[B, K]``.
        images: float32 ``[N, C, H, W]`` to train on; their device is where the work is done.
        labels: int64 ``[N]`` or, with ``label_kind``, float ``[N, K]``.
        test_images: float32 ``[M, C, H, W]``.
        test_labels: int64 ``[M]``.
        lr: learning rate; for a distilled set, the one learnt along with it.
        epochs: passes of each student over its images.
        students: numbers of the students; student ``s`` is initialised and shown its images by ``(seed, s)`` alone.
        seed: see ``students``.
        on_step: called after each training step and test batch; an exception from it ends the evaluation.
        options: the further arguments of `train_student`.

    Raises:
        ValueError: as `train_student` and `accuracy` do.
    """
    accuracies = []
    for student in students:
        net = seeded_net(make_net, seed, 2, student, device=images.device)
        generator = seeded_generator(seed, 3, student)
        train_student(net, images, labels, lr=lr, epochs=epochs, generator=generator, on_step=on_step, **options)
        accuracies.append(accuracy(net, test_images, test_labels, on_step=on_step))
    return accuracies
