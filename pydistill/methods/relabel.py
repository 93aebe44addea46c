"""Relabel and post-train: a teacher's soft labels for many random views of each image, and a student trained on them.

FKD (Shen and Xing, ECCV 2022) as SRe2L uses it: an epoch shows each image once, cropped, mirrored and mixed with
another of its batch, and what the teachers say of the view is stored beside the few numbers that make the view. The
student sees the same views, and no teacher:

    loss = KL(softmax(teacher / T) || softmax(student / T))

without the factor T^2, as in the published code, by AdamW under half a cosine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.data import DistilledSet
from pydistill.methods._standins import MultiCrop, SoftLabelStore, freeze, mixed_labels, multi_crop
from pydistill.methods.squeeze import NetworkName, Teacher, build
from pydistill.methods.training import OnEpoch, train
from pydistill.trajectory.experts import data_crc32, seeded_generator, seeded_net

__all__ = ["PostTrain", "Relabel", "post_train", "relabel"]

_METADATA = ("epochs", "batch_size", "crop", "flip", "mix", "alpha", "static", "seed")  # what makes the views


@dataclass(frozen=True)
class Relabel:
    """How the soft labels are made and stored; the defaults are SRe2L's."""

    epochs: int = 300
    """Views of each image."""
    batch_size: int = 128
    """Images that are shown, and mixed, together."""
    crop: float = 0.08
    """The least share of an image's area that a view shows."""
    flip: float = 0.5
    """Probability of a mirrored view."""
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    """How an image is mixed with another of its batch."""
    alpha: float = 1.0
    """The share of each is drawn from Beta(alpha, alpha)."""
    static: bool = False
    """Mix labels of the whole images (INFER) instead of asking the teachers about each view."""
    temperature: float = 20.0
    """T, by which the student's and the teachers' logits are divided."""
    format: Literal["fp16", "bf16", "topk", "topk8"] = "fp16"
    """How a label is stored: all logits in 16 bits, or the largest k probabilities."""
    k: int = 10
    """Probabilities that topk and topk8 keep."""
    seed: int = 0
    """Of all that is drawn."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"epochs": 100, "batch_size": 50, "crop": 0.5, "flip": 0.0},
        "fashion-mnist": {"epochs": 400, "batch_size": 50, "crop": 0.5},
        "cifar10": {"epochs": 400},
        "cifar100": {"epochs": 400},
        "tiny-imagenet": {"epochs": 200, "batch_size": 64},
        "imagenet-1k": {"batch_size": 1024},
    }
    # the paper's labels: mixup with Beta(0.8, 0.8), of the whole images
    infer: ClassVar[dict[str, Any]] = {"mix": "mixup", "alpha": 0.8, "static": True}

    @classmethod
    def preset(cls, dataset: str, method: str = "") -> Relabel:
        """The values for a data set and a method; the defaults for those that are not known."""
        return replace(cls(), **cls.presets.get(dataset, {}) | (cls.infer if method == "infer" else {}))

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {self.temperature}")
        if self.static and self.mix == "cutmix":
            raise ValueError("static: expected mix='mixup' or 'none': cutmix has no label without asking the teachers")

    def crops(self, side: int) -> MultiCrop:
        mix = None if self.mix == "none" else self.mix
        return MultiCrop(side, scale=(self.crop, 1.0), flip=self.flip, mix=mix, alpha=self.alpha)

    def order(self, count: int, epoch: int) -> tuple[Tensor, ...]:
        """The batches of an epoch, as numbers of images."""
        return torch.randperm(count, generator=seeded_generator(self.seed, 0, epoch)).split(self.batch_size)
