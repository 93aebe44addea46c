"""Checks of the arguments of `unroll` and `train_students`: a message names one, what it was and what it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill._devices import once, to_device
from pydistill._on_demand import OnDemand
from pydistill.ops.convnet_step import LabelKind
from pydistill.trajectory.flat import FlatModule


def check_training_set(
    flat: FlatModule, theta0: Tensor, images: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[int, bool]:
    """The largest class number (soft labels: number of classes minus one); whether students have their own labels."""
    for name, tensor in (("theta0", theta0), ("images", images), ("labels", labels)):
        if not isinstance(tensor, (Tensor, OnDemand) if name == "images" else Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != theta0.device:
            raise ValueError(f"{name}: expected device {theta0.device} as theta0, got {tensor.device}")
    check_theta(flat, theta0)
    E = len(theta0) if theta0.dim() == 2 else None
    if images.dim() != 4 and (E is None or images.dim() != 5 or len(images) != E):
        shapes = "[N, C, H, W]" if E is None else f"[N, C, H, W] or [{E}, N, C, H, W]"
        raise ValueError(f"images: expected {shapes}, got shape {list(images.shape)}")
    if images.dtype != theta0.dtype:
        raise TypeError(f"images: expected dtype {theta0.dtype} as theta0, got {images.dtype}")
    N = images.shape[-4]
    if N == 0:
        raise ValueError("images: expected at least one image, got an empty batch")
    hard = label_kind == "hard"
    own_labels = E is not None and labels.dim() == (2 if hard else 3)
    per_student = labels.shape[1:] if own_labels else labels.shape
    fits = not own_labels or len(labels) == E
    if hard:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64 class numbers for label_kind='hard', got {labels.dtype}")
        if per_student != (N,) or not fits:
            shapes = f"[{N}]" if E is None else f"[{N}] or [{E}, {N}]"
            raise ValueError(f"labels: expected shape {shapes} as images, got {list(labels.shape)}")
        low, high = once(bounds, labels)
        if low < 0:
            raise ValueError(f"labels: expected class numbers >= 0, got {low}")
        return high, own_labels
    check_choice("label_kind", label_kind, ("hard", "logits", "probs"))
    if labels.dtype != theta0.dtype:
        raise TypeError(
            f"labels: expected dtype {theta0.dtype} as theta0 for label_kind={label_kind!r}, got {labels.dtype}"
        )
    if len(per_student) != 2 or per_student[0] != N or not fits:
        shapes = f"[{N}, K]" if E is None else f"[{N}, K] or [{E}, {N}, K]"
        raise ValueError(f"labels: expected shape {shapes}, got {list(labels.shape)}")
    return per_student[1] - 1, own_labels


def check_theta(flat: FlatModule, theta0: Tensor) -> None:
    if not theta0.is_floating_point():
        raise TypeError(f"theta0: expected a floating dtype, got {theta0.dtype}")
    P = flat.numel
    if theta0.shape[-1:] != (P,) or theta0.dim() not in (1, 2) or not len(theta0):
        raise ValueError(f"theta0: expected shape [{P}] or [E, {P}] for this net, got {list(theta0.shape)}")


def check_rate(name: str, value: Any) -> None:
    """For momentum and weight decay."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def check_augment(augment: Any) -> None:
    if augment is not None and not callable(augment):
        raise TypeError(f"augment: expected a callable or None, got {type(augment).__name__}")
    if isinstance(augment, type):
        raise TypeError(f"augment: expected an object, as {augment.__name__}() makes one, got the class")


def check_lr(lr: Tensor | float, theta0: Tensor) -> Tensor:
    if not isinstance(lr, Tensor):
        if not isinstance(lr, (int, float)):
            raise TypeError(f"lr: expected a tensor of one element or a number, got {type(lr).__name__}")
        return theta0.new_full((), float(lr))
    if lr.numel() != 1 and (theta0.dim() != 2 or lr.shape != theta0.shape[:1]):
        shapes = "one element" if theta0.dim() == 1 else f"one element or [{len(theta0)}]"
        raise ValueError(f"lr: expected {shapes}, got shape {list(lr.shape)}")
    if not lr.is_floating_point():
        raise TypeError(f"lr: expected a floating dtype, got {lr.dtype}")
    if lr.device != theta0.device:
        raise ValueError(f"lr: expected device {theta0.device} as theta0, got {lr.device}")
    return lr


def check_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, E: int
) -> list[torch.Generator | None]:
    """One that all students share, or E."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator]
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(f"generator: expected a torch.Generator, a sequence of them or None, got {generator!r}")
    if len(generator) != E or len({id(each) for each in generator}) != E:
        distinct = len({id(each) for each in generator})
        raise ValueError(
            f"generator: expected one for each of {E} students, got {len(generator)}, of which {distinct} distinct"
        )
    return list(generator)


def check_batches(
    batches: Sequence[Tensor], batch_size: int | None, steps: int, N: int, device: torch.device, students: int
) -> list[Tensor]:
    if batch_size is not None:
        raise ValueError("batches: expected either batches or batch_size, got both")
    if not isinstance(batches, (Sequence, Tensor)):
        raise TypeError(f"batches: expected {steps} index tensors, one a step, got {type(batches).__name__}")
    if len(batches) != steps:
        raise ValueError(f"batches: expected {steps} index tensors, one a step, got {len(batches)}")
    for k, index in enumerate(batches):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() not in (1, 2):
            raise TypeError(f"batches[{k}]: expected an int64 tensor [B] or [E, B]")
        if index.dim() == 2 and len(index) != students:
            raise ValueError(f"batches[{k}]: expected a row for each of {students} students, got {len(index)}")
        if index.shape[-1] == 0:
            raise ValueError(f"batches[{k}]: expected at least one image, got an empty batch")
        if index.device != batches[0].device or index.device not in (device, torch.device("cpu")):
            raise ValueError(f"batches[{k}]: expected all on {device} as images, or all on cpu, got {index.device}")
    joined = torch.cat([index.flatten() for index in batches])  # a copy: the caller may reuse these tensors
    low, high = bounds(joined)
    if low < 0 or high >= N:
        raise ValueError(f"batches: expected image numbers in 0..{N - 1}, got {low if low < 0 else high}")
    parts = to_device(joined, device).split([index.numel() for index in batches])
    return [part.view(index.shape) for part, index in zip(parts, batches, strict=True)]


def bounds(numbers: Tensor) -> tuple[int, int]:
    """The least and the largest of them, for which the host waits."""
    low, high = torch.stack(numbers.aminmax()).tolist()
    return low, high


def check_positive(lr: Tensor) -> Tensor:
    if not bool(((lr > 0) & lr.isfinite()).all()):
        got = lr.item() if lr.numel() == 1 else lr.tolist()
        raise ValueError(f"lr: expected a positive finite number, got {got}")
    return lr


def is_of_other_size(eval_data: Any, image: Sequence[int]) -> bool:
    known = isinstance(eval_data, (tuple, list)) and eval_data and isinstance(eval_data[0], (Tensor, OnDemand))
    return bool(known) and eval_data[0].shape[1:] != tuple(image)


def check_eval_data(eval_data: tuple[Tensor, Tensor], images: Tensor, image: Sequence[int]) -> None:
    if not isinstance(eval_data, (tuple, list)) or len(eval_data) != 2:
        raise TypeError(f"eval_data: expected a pair of images and labels, got {type(eval_data).__name__}")
    x, y = eval_data
    if not isinstance(x, (Tensor, OnDemand)) or not isinstance(y, Tensor):
        raise TypeError(f"eval_data: expected two tensors, got {type(x).__name__} and {type(y).__name__}")
    if x.dtype != images.dtype or y.dtype != torch.int64:
        raise TypeError(f"eval_data: expected {images.dtype} images and int64 labels, got {x.dtype} and {y.dtype}")
    if x.device != images.device or y.device != images.device:
        raise ValueError(f"eval_data: expected device {images.device} as images, got {x.device} and {y.device}")
    if x.shape[1:] != tuple(image) or not len(x) or y.shape != x.shape[:1]:
        wanted = f"[M, {', '.join(map(str, image))}] and labels [M], M >= 1"
        raise ValueError(f"eval_data: expected images {wanted}, got {list(x.shape)} and {list(y.shape)}")
