"""A step of E students: its inputs and its results."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One step's images and labels, each with a leading [E] where students have their own."""

    images: Tensor  # [B, C, H, W] or [E, B, C, H, W]
    labels: Tensor  # [B] or [B, K], or with [E] in front
    per_student: bool  # whether labels has [E] in front


class Descent(NamedTuple):
    """What a step needs: each student's loss and its gradient, and the logits where they were asked for."""

    losses: Tensor  # [E]
    grad: Tensor  # [E, P]
    logits: Tensor | None  # [E, B, K]
    unused: tuple[frozenset[str], ...] = ()  # each student's parameters that its loss did not use; empty: none


class Adjoint(NamedTuple):
    """<g, direction>, and scale [E] times its derivatives; a field is None where it was not asked for."""

    slope: Tensor  # [E]: <g, direction>
    curvature: Tensor | None  # [E, P]: along theta
    images: Tensor | None  # [E, B, C, H, W]
    labels: Tensor | None  # [E, B, K]


def of_student(batch: Batch, e: int) -> tuple[Tensor, Tensor]:
    x = batch.images[e] if batch.images.dim() == 5 else batch.images
    return x, batch.labels[e] if batch.per_student else batch.labels


def check_classes(label_kind: str, largest_label: int, labels: Tensor, classes: int) -> None:
    if label_kind == "hard":
        if largest_label >= classes:
            raise ValueError(f"labels: expected class numbers below the net's {classes} classes, got {largest_label}")
    elif labels.shape[-1] != classes:
        raise ValueError(f"labels: expected [N, {classes}] for the net's classes, got [N, {labels.shape[-1]}]")


def saved_tensors(ctx: Any, names: str) -> tuple[Tensor, ...]:
    """What the forward pass saved, or RuntimeError where one of ``names`` has changed since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{names}: one of them was changed in place between the forward pass and its backward pass, which computes "
            "from it again; change a clone instead"
        ) from error
