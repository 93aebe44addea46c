"""Images with their stored labels, for a plain ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from pydistill.labels.soft_labels import SoftLabels
from pydistill.labels.store import SoftLabelStore

__all__ = ["SoftLabelDataset", "StoredBatches", "collate_soft_labels"]


class _Batch(tuple):
    """Images and labels that are collated already."""


class SoftLabelDataset(Dataset):
    """Map-style: item i is image i with its label and record at the current epoch.

    ::

        data = SoftLabelDataset(images, store)
        loader = DataLoader(data, batch_sampler=StoredBatches(data), num_workers=2)
        for epoch in range(epochs):
            data.set_epoch(epoch)
            for images, labels in loader:
                images = multi_crop(images, labels.crops(), 224)
                loss = labels.loss(student(images))

    A loader needs no ``collate_fn``, and may shuffle and drop the last batch where images were not mixed (see
    `StoredBatches`). Workers may be forked, spawned and persistent: the epoch is in shared memory. Call `set_epoch`
    between iterations of the loader, not during one; `SoftLabels` says which epoch it is of.

    Args:
        images: a tensor ``[num_images, ...]``, or a map-style data set whose items are an image, or a tuple that
            begins with one; image i of the store is item i. None if the images need not pass through the loader, for
            example if they are on the student's device: items are (None, labels), and ``labels.images`` says which.
        store: of labels, open for reading.
        epoch: the first.

    Raises:
        IndexError: the store has no such epoch.
        ValueError: the number of images is not the store's, the store is open for writing, or it lacks labels of the
            epoch.
    """

    def __init__(self, images: Tensor | Dataset[Any] | Sequence[Any] | None, store: SoftLabelStore, epoch: int = 0):
        if not isinstance(store, SoftLabelStore):
            raise TypeError(f"store: expected an open SoftLabelStore, got {store!r}")
        count = store.num_images if images is None else len(images)  # type: ignore[arg-type]  # a Dataset may have none
        if count != store.num_images:
            raise ValueError(f"images: expected {store.num_images} as the store {store.path} has, got {count}")
        if store._writable:
            raise ValueError(f"store: expected one that is open for reading, {store.path} is open for writing")
        self.images, self.store = images, store
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self.set_epoch(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose labels come next; errors as for the class."""
        if (lacking := self.store.missing(epoch)).size:
            raise ValueError(
                f"{self.store.path}: epoch {epoch} lacks the labels of {lacking.size} of {len(self.store)} images, the "
                f"first of them image {lacking[0]}"
            )
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.store.num_images

    def __getitem__(self, index: int) -> tuple[Any, SoftLabels]:
        """The image and a `SoftLabels` of one row; IndexError for an image that there is not."""
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"index: expected a whole number, got {index!r}")
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected one of 0..{len(self) - 1}, got {index}")
        return None if self.images is None else self.images[index], self._read([index])

    def __getitems__(self, indices: list[int]) -> list[_Batch]:
        """A whole batch in a list of one, which torch's loader asks for if available and gives to its collate_fn."""
        labels = self._read(indices)
        if self.images is None:
            return [_Batch((None, labels))]
        if isinstance(self.images, Tensor):
            return [_Batch((self.images[labels.images], labels))]
        return [_Batch((default_collate([self.images[index] for index in indices]), labels))]

    def _read(self, indices: list[int]) -> SoftLabels:
        epoch, images = self.epoch, np.asarray(indices)
        places = torch.from_numpy(self.store.places(epoch, images))
        return replace(self.store.read(epoch, images), places=places, store=str(self.store.path))


def collate_soft_labels(batch: Sequence[tuple[Any, SoftLabels]]) -> tuple[Any, SoftLabels]:
    """A ``collate_fn`` for items of a `SoftLabelDataset`: the images and their joint `SoftLabels`.

    A loader's own does the same, unless items have no images and are taken one by one.

    Raises:
        ValueError: the labels are of several stores that differ in more than their rows, or with records, whose images
            are looked for in the batch; or of several epochs.
    """
    if isinstance(batch[0], _Batch):
        return batch[0][0], batch[0][1]
    images, labels = zip(*batch, strict=True)
    return None if images[0] is None else default_collate(list(images)), _joint(labels)


def _joint(labels: Sequence[SoftLabels], **_: Any) -> SoftLabels:
    first = labels[0]
    for other in labels:
        if other.store == first.store and other.epoch == first.epoch:
            continue
        for name in ("layout", "epoch", "device"):
            if (here := getattr(other, name)) != (there := getattr(first, name)):
                raise ValueError(f"labels: expected one {name} in a batch, got {there} and {here}")
        if first.layout.features or first.layout.record_bytes:  # a classifier, and places that records name
            raise ValueError(f"labels: expected those of one store in a batch, got {first.store} and {other.store}")
    parts: dict[str, Any] = {
        name: torch.cat([getattr(each, name) for each in labels]) for name in ("images", "rows", "places")
    }
    return replace(first, **parts)


# torch's own collate_fn looks types up there
default_collate_fn_map[_Batch] = lambda batch, **_: collate_soft_labels(batch)
default_collate_fn_map[SoftLabels] = _joint


class StoredBatches(Sampler[list[int]]):
    """The batches of a data set's current epoch as they were written, in that order: a loader's ``batch_sampler``.

    If images were mixed within their batch (mixup, cutmix), their partners are in these batches, and
    `SoftLabels.crops` refuses batches that lack one. If not, any other sampler will do.
    """

    def __init__(self, data: SoftLabelDataset):
        self.data = data

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.data.store.batches(self.data.epoch))

    def __len__(self) -> int:
        return self.data.store.blocks
