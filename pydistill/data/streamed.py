"""Normalised images of a source, read when they are asked for, where a data set in memory has a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pydistill._devices import to_device
from pydistill._on_demand import OnDemand
from pydistill.data.reading import read_ahead
from pydistill.data.sources import ArrayImages, ImageSource

__all__ = ["StreamedImages", "batches_of", "held", "mean_and_std"]

_HELD = 1 << 26  # bytes of a source that is held in memory, since it is small
_BATCH = 64


class StreamedImages(OnDemand):
    """Normalised images that are read and decoded on demand: what `Dataset` has instead of a tensor for a large set.

    It is indexed like the tensor ``[N, C, H, W]`` and gives copies; in memory are only those. `batches` reads ahead. A
    source of no more than 64 MB is held in memory, as bytes, from the first use on.

    Args:
        source: where from.
        mean, std: float32 ``[C]``: an image is ``(pixel - mean) / std``.
        device: where the images go; they travel as bytes.
        workers: processes that read ahead in `batches`.
    """

    dtype = torch.float32

    def __init__(
        self,
        source: ImageSource,
        mean: Tensor,
        std: Tensor,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ):
        self.mean, self.std, self.device, self.workers = mean, std, torch.device(device), workers
        self._source = source
        self._space = [each.to(self.device)[:, None, None] for each in (mean, std)]

    @cached_property
    def source(self) -> ImageSource:
        """Where the images are read from."""
        return held(self._source, self.workers)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self._source.shape))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        places = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index]
        images = torch.from_numpy(self.source.read(places.flatten()))
        return self._normalised(images.view(*places.shape, *self.source.shape))

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images at each of some ``[B]`` places in turn; the workers end with the iterator."""
        for images, _ in read_ahead(self.source, [index.cpu() for index in indices], self.workers):
            yield self._normalised(images)

    def split(self, size: int) -> Iterator[Tensor]:
        return self.batches(torch.arange(len(self), device="cpu").split(size))

    def to(self, device: torch.device | str) -> StreamedImages:
        """The same images, given on another device."""
        source = self.__dict__.get("source", self._source)  # as it is held, if it is
        return StreamedImages(source, self.mean, self.std, device=device, workers=self.workers)

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = self._space
        return images.to(self.device).float().mul_(1 / 255).sub_(mean).div_(std)


def batches_of(images: Tensor | StreamedImages, indices: Sequence[Tensor]) -> Iterator[Tensor]:
    """``images[index]`` for each index ``[B]`` in turn; streamed images are read ahead."""
    if isinstance(images, StreamedImages):
        return images.batches(indices)
    return (images[to_device(index, images.device)] for index in indices)


def held(source: ImageSource, workers: int) -> ImageSource:
    """The source in memory if its images are no more than 64 MB as bytes, else itself."""
    if isinstance(source, ArrayImages) or len(source) * math.prod(source.shape) > _HELD:
        return source
    images = torch.empty((len(source), *source.shape), dtype=torch.uint8, device="cpu")
    indices = torch.arange(len(source), device="cpu").split(_BATCH)
    for index, (batch, _) in zip(indices, read_ahead(source, indices, workers), strict=True):
        images[index] = batch
    return ArrayImages(images, source.labels, source.class_names)


def mean_and_std(source: ImageSource, workers: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel's pixels in [0, 1], float32 ``[C]``: of a packed set at once, else by a pass.

    They are computed from counts of the 256 values, and so do not depend on the order of the images.
    """
    counts = source.histogram
    if counts is None:
        counts = torch.zeros(source.shape[0], 256, dtype=torch.int64, device="cpu")
        for images, _ in read_ahead(source, torch.arange(len(source), device="cpu").split(_BATCH), workers):
            for channel, row in zip(images.unbind(1), counts, strict=True):
                row += channel.reshape(-1).bincount(minlength=256)
    values = (torch.arange(256, dtype=torch.float32, device="cpu") * (1 / 255)).double()  # as images have them
    total = counts.sum(1)
    mean = (counts * values).sum(1) / total
    std = ((counts * (values - mean[:, None]).square()).sum(1) / total).sqrt()
    return mean.float(), std.clamp_min(1e-6).float()
