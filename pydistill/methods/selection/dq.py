"""Dataset Quantization (Zhou et al., ICCV 2023): bins of real images by graph cut, a few from each, fewer patches.

Each class is cut into bins, one after the other, by `pydistill.select.graph_cut_greedy` on the gradients of a trained
network's classifier, ``[b, b (x) e]`` with b the gradient of the loss in the logits and e the features: early bins are
close to the whole class, late ones are what is left. The same number is drawn uniformly from every bin. In each image
the patches that count least for its label (Grad-CAM) are dropped.

The paper's code trains a separate network for every bin; here all bins share one. For b it takes the cross-entropy of
softmax(softmax(z)); here b is the gradient of the cross-entropy that the network was trained with. It fills dropped
patches by a masked autoencoder; see `pydistill.select.drop_patches` for what is done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.data import Dataset, DistilledSet
from pydistill.methods.method import check_numbers
from pydistill.methods.selection.picking import Picking, class_members, embed
from pydistill.nn.student import Student
from pydistill.seeding import Stream, seeded_generator
from pydistill.select import drop_patches, graph_cut_greedy, patch_importance

__all__ = ["DQ", "quantize"]


@dataclass(frozen=True)
class DQ(Picking):
    """Dataset Quantization's options; `preset` has the values for a data set."""

    name: ClassVar[str] = "dq"
    about: ClassVar[str] = "DQ: from bins that cover each class"
    paper: ClassVar[str] = "Zhou et al., ICCV 2023"
    shares: ClassVar[tuple[str, ...]] = ("keep",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"teacher_epochs": 6, "teacher_lr": 0.05, "teacher_batch": 64, "patch_size": 4},
        # for few images per class, from its middle; the paper's ten bins are for a tenth of a set or more
        "fashion-mnist": {
            **{"teacher_epochs": 2, "teacher_lr": 0.02, "teacher_batch": 128},
            **{"bins": 1, "bin_size": 600, "gradients": False},
        },
    }

    bins: int = 10
    """Bins per class."""
    bin_size: int | None = None
    """Images per bin of a class; by default all images are in bins, as in the paper."""
    lam: float = 1.0
    """Weight of the similarity to the whole class."""
    gradients: bool = True
    """Compare gradients of the classifier, otherwise its features."""
    keep: float = 1.0
    """Share of each image's patches to keep."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    fill: Literal["mean", "bilinear"] = "bilinear"
    """How dropped patches are filled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, lam=0)

    def pick(self, dataset: Dataset, teacher: Student, **options: Any) -> DistilledSet:
        return quantize(self, dataset, teacher, **options)

    def check(self, dataset: Dataset) -> None:
        for members in self._members(dataset):
            binned = self.bins * self._size(members)
            if self.ipc > binned:
                raise ValueError(f"ipc: expected at most {binned}, the images in the bins of a class, got {self.ipc}")
        if self.keep < 1 and any(side % self.patch_size for side in dataset.train_images.shape[2:]):
            sides = list(dataset.train_images.shape[2:])
            raise ValueError(f"patch_size: expected a divisor of the images' {sides} pixels, got {self.patch_size}")

    def _members(self, dataset: Dataset) -> list[Tensor]:
        least = self.bins * (self.bin_size or 1)
        return class_members(dataset, max(self.ipc, least), "ipc, bins * bin_size")

    def _size(self, members: Tensor) -> int:
        """Images of a class in each bin."""
        return self.bin_size or len(members) // self.bins


def quantize(config: DQ, dataset: Dataset, teacher: Student, *, lr: float = 0.01, on_class: Any = None) -> DistilledSet:
    """The images of each class that DQ draws; the same seed gives the same ones.

    Args:
        config: the options.
        dataset: real images.
        teacher: a trained network, in evaluation mode.
        lr: learning rate for students.
        on_class: called after each class; an exception from it ends the selection.

    Raises:
        ValueError: more images or bins than a class has, or patches that do not fill the images.
    """
    config.check(dataset)
    chosen = []
    for label, members in enumerate(config._members(dataset)):
        bins = class_bins(config, dataset, teacher, members)
        generator = seeded_generator(config.seed, Stream.BINS, label)
        # each bin's images in its own random order; then the first of every bin, the second of every bin, ...
        drawn = torch.stack([members[row[torch.randperm(len(row), generator=generator, device="cpu")]] for row in bins])
        chosen.append(drawn.T.flatten()[: config.ipc])
        if on_class is not None:
            on_class()
    index = torch.cat(chosen)
    images, labels = dataset.train_images[index], dataset.train_labels[index]
    if config.keep < 1:
        layer = teacher.features if isinstance(teacher.features, torch.nn.Module) else None
        importance = patch_importance(teacher, images, labels, config.patch_size, layer=layer)
        images, _ = drop_patches(images, importance, config.keep, fill=config.fill)
    return config.distilled(dataset, images, labels, lr)


def class_bins(config: DQ, dataset: Dataset, teacher: Student, members: Tensor) -> Tensor:
    """int64 ``[bins, size]``: places in ``members``, the images of one class."""
    features = embed(teacher, dataset.train_images[members])
    factors = None
    if config.gradients:
        with torch.no_grad():
            logits = teacher.classifier(features)
        # d CE / d logits
        factors = logits.double().softmax(1) - F.one_hot(dataset.train_labels[members], logits.shape[1])
    size = config._size(members)
    picks = graph_cut_greedy(features, size, factors=factors, lam=config.lam, bins=config.bins)
    return picks.view(config.bins, size).cpu()
