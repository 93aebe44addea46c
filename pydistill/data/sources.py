"""Image sources: labelled images that are read on demand, as bytes of one size."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pydistill._atomic import PathLike
from pydistill.data.pictures import read_picture

__all__ = ["ArrayImages", "ImageSource", "Names", "PictureSource"]


class ImageSource:
    """Labelled images of one size that are read on demand, in any order.

    A source can be pickled for the workers of a data loader; what grows with the number of images is in tensors,
    which those workers share however they are started.

    Attributes:
        labels: int64 ``[N]`` in ``[0, K)``.
        class_names: ``K`` names, in label order.
        shape: ``(C, H, W)`` of an image.
        decodes: whether reading takes long enough for workers that read ahead; where it does not, handing images over
            from one process to another takes longer.
    """

    decodes: bool = False
    labels: Tensor
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def crc32(self) -> int:
        """A checksum of what distinguishes the source from others, without reading its images."""
        return zlib.crc32(self.labels.numpy().data)

    @property
    def histogram(self) -> Tensor | None:
        """How often the images have each value in each channel, int64 ``[C, 256]``, if that is known."""
        return None

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, damaged: dict[int, str] | None = None) -> np.ndarray:
        """Some images, uint8 ``[B, C, H, W]``, a copy.

        Args:
            indices: integers ``[B]``, in any order.
            damaged: receives a message for each picture that is damaged, by its place in ``indices``; such a picture is
                black. None: it raises.

        Raises:
            IndexError: there is no such image.
            ValueError: an image is damaged; says where it is.
        """
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices: expected images 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        images = np.empty((len(indices), *self.shape), np.uint8)
        self._read_into(images, indices, damaged)
        return images

    def _read_into(self, images: np.ndarray, indices: np.ndarray, damaged: dict[int, str] | None) -> None:
        raise NotImplementedError


class ArrayImages(ImageSource):
    """A source in memory.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        class_names: in label order.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str]):
        self.images, self.labels, self.class_names = images, labels, tuple(class_names)
        _, channels, height, width = images.shape
        self.shape = channels, height, width

    def crc32(self) -> int:
        return zlib.crc32(self.images.numpy().data, super().crc32())

    def _read_into(self, images: np.ndarray, indices: np.ndarray, damaged: dict[int, str] | None) -> None:
        np.take(self.images.numpy(), indices, 0, images, mode="clip")  # unchecked: `read` has


class PictureSource(ImageSource):
    """A source of pictures in files of whatever kind, which subclasses find.

    Args:
        size: height and width in pixels, as `read_picture` gives them.
    """

    decodes = True

    def __init__(self, size: int):
        self.shape = 3, size, size

    def name(self, index: int) -> str:
        """What messages call a picture: where it is."""
        raise NotImplementedError

    def _encoded(self, index: int) -> PathLike | bytes:
        """A picture's file, or its content."""
        raise NotImplementedError

    def _order(self, indices: np.ndarray) -> np.ndarray:
        """The places in ``indices`` in the order in which they are best read."""
        return np.arange(len(indices))

    def _read_into(self, images: np.ndarray, indices: np.ndarray, damaged: dict[int, str] | None) -> None:
        for place in self._order(indices).tolist():
            index = int(indices[place])
            try:
                images[place] = read_picture(self._encoded(index), self.shape[1], self.name(index))
            except ValueError as error:
                if damaged is None:
                    remedy = "remove it, or leave it out by packing the set with skip_damaged (pack --skip-damaged)"
                    raise ValueError(f"{error}: {remedy}") from error
                images[place], damaged[place] = 0, str(error)


class Names(Sequence[str]):
    """Many file names in two tensors: a list of a million strings takes four times the memory, in each process."""

    def __init__(self, names: Iterable[str]):
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._text = torch.from_numpy(np.frombuffer(text, np.uint8))
        self._ends = torch.from_numpy(np.frombuffer(ends, np.int64))

    def crc32(self) -> int:
        return zlib.crc32(self._ends.numpy().data, zlib.crc32(self._text.numpy().data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._text[start:end].numpy().tobytes())
