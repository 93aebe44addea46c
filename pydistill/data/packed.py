"""An image set in one file, resized and decoded: what is read many times is packed once.

A `StoreFile`. All integers are little-endian::

    header    JSON: name, shape, class names, images of training and test, what they were packed from
    table     [N] entries: checksum and label of each image, training images first
    counts    [blocks, C, 256] uint32 and a checksum each: how often the training images of a block have each value
    images    [N, C, H, W] uint8

Images are written a block at a time, synced, and only then entered in table and counts. So what a killed `pack` left
is continued from its last whole block; and since a file gets its name when it is whole, no other is ever found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydistill import _host
from pydistill._atomic import PathLike, check_replaceable, naming, put_in_place
from pydistill._store_file import StoreFile, check_of, round_up
from pydistill.data.reading import read_ahead
from pydistill.data.sources import ImageSource

__all__ = ["PackedImages", "pack"]

_PAGE = 4096
_BLOCK = 1 << 24  # bytes of images, at most
_SKIPPED = 0xFFFFFFFF  # as a label: a damaged picture, whose place is empty
_ENTRY = np.dtype([(name, "<u4") for name in ("crc32", "label", "check")])
_HEADER: dict[str, Callable[[Any], bool]] = {  # what each field has to be
    "name": lambda value: isinstance(value, str),
    "shape": lambda value: isinstance(value, list) and len(value) == 3 and all(_is_count(each) for each in value),
    "train": lambda value: _is_count(value),
    "test": lambda value: _is_count(value),
    "class_names": lambda value: isinstance(value, list) and len(value) > 0,
    "source_crc32": lambda value: isinstance(value, list),
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


class PackedImages(StoreFile):
    """A packed image set: `train` and `test` are its sources. A context manager that closes its file.

    The checksum of an image is verified the first time that an object reads it. Images are read and not mapped, since
    pages of a mapped file count as this process's memory. It can be pickled, which opens it again.

    Attributes:
        path: the file.
        name: of the set.
        shape: ``(C, H, W)`` of an image.
        class_names: in label order.

    Args:
        path: a file that `pack` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, damaged in its header or table, or of a newer version.
    """

    _kind, _magic, _version, _fields = "a packed image set", b"PYDIMGS\0", 1, _HEADER

    def _open(self) -> None:
        super()._open()
        assert self._bytes is not None
        count = sum(self._parts)
        self._table = self._bytes[self._table_at :][: count * _ENTRY.itemsize].view(_ENTRY)
        self._verified = np.zeros(count, bool)
        self._written = os.fstat(self._file.fileno()).st_mtime_ns
        if not self._writable and not (check_of(self._table) == self._table["check"]).all():
            raise ValueError(f"{self.path}: its table is damaged: pack the set again")

    def close(self) -> None:
        self._table = np.empty(0, _ENTRY)  # a view of the map, which holds the file and its lock
        super().close()

    def _layout(self, start: int) -> None:
        header = self.header
        self.name, self.shape, self.class_names = header["name"], tuple(header["shape"]), tuple(header["class_names"])
        self._parts = header["train"], header["test"]
        self._image_bytes, count = math.prod(self.shape), sum(self._parts)
        self._block = max(1, _BLOCK // self._image_bytes)
        self._count_bytes = (self.shape[0] * 256 + 1) * 4
        self._table_at = round_up(start, _PAGE)
        self._counts_at = self._table_at + count * _ENTRY.itemsize
        self._images_at = round_up(self._counts_at + -(-count // self._block) * self._count_bytes, _PAGE)
        self._size = self._images_at + count * self._image_bytes

    @property
    def train(self) -> ImageSource:
        """The training images."""
        return _PackedPart(self, 0, self._parts[0])

    @property
    def test(self) -> ImageSource:
        """The test images."""
        return _PackedPart(self, self._parts[0], sum(self._parts))

    @property
    def skipped(self) -> int:
        """How many damaged pictures were left out."""
        return int((self._table["label"] == _SKIPPED).sum())

    @cached_property
    def histogram(self) -> Tensor:
        """How often the training images have each value in each channel, int64 ``[C, 256]``.

        Raises:
            ValueError: it is damaged.
        """
        blocks = -(-sum(self._parts) // self._block)
        raw = self._read(self._counts_at, blocks * self._count_bytes).view("<u4").reshape(blocks, -1)
        if any(_host.crc32(row[:-1].view(np.uint8)) != row[-1] for row in raw):
            raise ValueError(f"{self.path}: its counts of values are damaged: pack the set again")
        return torch.from_numpy(raw[:, :-1].sum(0, dtype=np.int64).reshape(-1, 256))

    def verify(self) -> None:
        """Reads every image; ValueError for the first whose checksum does not match its bytes."""
        self._verified[:] = False
        for start in range(0, sum(self._parts), self._block):
            places = np.arange(start, min(start + self._block, sum(self._parts)))
            places = places[self._table["label"][places] != _SKIPPED]
            self._read_images(np.empty((len(places), *self.shape), np.uint8), places)

    def _read_images(self, images: np.ndarray, places: np.ndarray) -> None:
        self._check_open()
        if not self._writable and os.fstat(self._file.fileno()).st_mtime_ns != self._written:
            raise ValueError(f"{self.path}: it was written to since it was opened: open it again")
        for image, place in zip(images, places.tolist(), strict=True):
            at = self._images_at + place * self._image_bytes
            self._check_reaches(at + self._image_bytes)
            if hasattr(os, "preadv"):
                os.preadv(self._file.fileno(), [image], at)  # type: ignore[list-item]  # an array is a buffer
            else:
                image.reshape(-1)[:] = self._read(at, self._image_bytes)
            if not self._verified[place]:
                if _host.crc32(image.reshape(-1)) != self._table["crc32"][place]:
                    raise ValueError(f"{self.path}: image {place} is damaged: pack the set again")
                self._verified[place] = True

    def _is_done(self, start: int) -> bool:
        """Whether the block from an image on was written whole, by this process or a killed one."""
        entries = self._table[start : start + self._block]
        return bool((check_of(entries) == entries["check"]).all())

    def _began_with(self, source: ImageSource) -> bool:
        """Whether what is done came from these images; names do not tell, so the first of up to 16 blocks are read."""
        done = [start for start in range(0, sum(self._parts), self._block) if self._is_done(start)]
        for start in done[:: -(-len(done) // 16) or 1]:
            damaged: dict[int, str] = {}
            image, entry = source.read([start], damaged)[0], self._table[start]
            if bool(damaged) != (entry["label"] == _SKIPPED):
                return False
            if not damaged and _host.crc32(image.reshape(-1)) != entry["crc32"]:
                return False
        return True

    def _append(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes a block; it is on disk when this returns."""
        self._write(self._images_at + start * self._image_bytes, images.reshape(-1))
        self._sync()
        entries = np.zeros(len(images), _ENTRY)
        entries["label"] = labels
        entries["crc32"] = [_host.crc32(image.reshape(-1)) for image in images]
        entries["check"] = check_of(entries)
        seen = images[: max(0, self._parts[0] - start)][labels[: max(0, self._parts[0] - start)] != _SKIPPED]
        counts = np.array([np.bincount(channel.ravel(), minlength=256) for channel in seen.swapaxes(0, 1)], "<u4")
        raw = counts.tobytes()
        at = self._counts_at + start // self._block * self._count_bytes
        self._write(at, raw + int(_host.crc32(np.frombuffer(raw, np.uint8))).to_bytes(4, "little"))
        self._sync()
        self._write(self._table_at + start * _ENTRY.itemsize, entries.tobytes())
        self._sync()


class _PackedPart(ImageSource):
    """The training or the test images of a packed set."""

    def __init__(self, store: PackedImages, start: int, stop: int):
        self.store, self.shape, self.class_names = store, store.shape, store.class_names
        self._start, self._stop = start, stop

    @cached_property
    def _places(self) -> np.ndarray | None:
        """The places of the images in the file; None: all from the first on."""
        kept = self.store._table["label"][self._start : self._stop] != _SKIPPED
        return None if kept.all() else np.flatnonzero(kept)

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        labels = self.store._table["label"][self._start : self._stop].astype(np.int64)
        return torch.from_numpy(labels if self._places is None else labels[self._places])

    def __len__(self) -> int:
        return self._stop - self._start if self._places is None else len(self._places)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.store, self._start, self._stop

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _PackedPart.__init__(self, *state)

    @property
    def histogram(self) -> Tensor | None:
        return self.store.histogram if self._start == 0 else None

    def _read_into(self, images: np.ndarray, indices: np.ndarray, damaged: dict[int, str] | None) -> None:
        self.store._read_images(images, self._start + (indices if self._places is None else self._places[indices]))


def pack(
    train: ImageSource,
    test: ImageSource,
    path: PathLike,
    *,
    name: str,
    workers: int = 0,
    skip_damaged: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> PackedImages:
    """Packs an image set into one file; equal images give equal bytes.

    Interrupted or killed at any moment, it continues when called again with the same arguments: what is done so far is
    in a hidden file beside ``path``.

    Args:
        train, test: the images, of the same shape and classes.
        path: the file to make.
        name: of the set, as `load` takes it.
        workers: processes that decode; 0: this one.
        skip_damaged: leave out damaged pictures and count them, instead of raising.
        overwrite: whether a file at ``path`` may be replaced.
        tell: called with a line about each picture that is left out.
        on_step: called with the number of images done; an exception from it ends the work, which can be continued.

    Raises:
        FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
        ValueError: the sources do not fit each other, a picture is damaged, or no training picture of a class is not;
            it is named. Or another process packs into the same file.
    """
    path = Path(path)
    check_replaceable(path, overwrite)
    if (train.shape, train.class_names) != (test.shape, test.class_names):
        raise ValueError("test: expected images of the shape and the classes of train, got others")
    header = {
        "name": name,
        "shape": list(train.shape),
        "train": len(train),
        "test": len(test),
        "class_names": list(train.class_names),
        "source_crc32": [train.crc32(), test.crc32(), int(skip_damaged)],
    }
    partial = path.with_name(f".{path.name}.packing")
    joined, total = _Joined(train, test), len(train) + len(test)
    with naming(path), _begun(partial, header, joined) as store:
        starts = [start for start in range(0, total, store._block) if not store._is_done(start)]
        if on_step is not None:
            on_step(total - sum(min(store._block, total - start) for start in starts))
        labels = torch.cat([train.labels, test.labels]).numpy()
        blocks = [torch.arange(start, min(start + store._block, total), device="cpu") for start in starts]
        read = read_ahead(joined, blocks, workers, skip_damaged=skip_damaged)
        for index, (images, damaged) in zip(blocks, read, strict=True):
            kept = labels[index.numpy()].astype(np.uint32)
            kept[list(damaged)] = _SKIPPED
            if tell is not None:
                for message in damaged.values():
                    tell(f"left out {message}")
            store._append(int(index[0]), images.numpy(), kept)
            if on_step is not None:
                on_step(len(index))
        kept = store._table["label"].copy()
        for part, among in (("train", kept[: len(train)]), ("test", kept[len(train) :])):
            left = set(range(len(train.class_names))) - set(among.tolist())
            if left:
                raise ValueError(
                    f"{part}: expected a whole picture of each class, {train.class_names[min(left)]!r} has none"
                )
    put_in_place(partial, path)
    return PackedImages(path)


def _begun(partial: Path, header: dict[str, Any], images: ImageSource) -> PackedImages:
    """What a killed `pack` of the same images left, or an empty file."""
    try:
        store = PackedImages(partial, writable=True)
        if store.header == header and store._began_with(images):
            return store
        store.close()
    except FileNotFoundError:
        pass
    PackedImages._make(partial, header)
    return PackedImages(partial, writable=True)


class _Joined(ImageSource):
    """Training images, then test images."""

    def __init__(self, train: ImageSource, test: ImageSource):
        self.parts, self.shape, self.class_names = (train, test), train.shape, train.class_names
        self.decodes = train.decodes

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _read_into(self, images: np.ndarray, indices: np.ndarray, damaged: dict[int, str] | None) -> None:
        for source, first in zip(self.parts, (0, len(self.parts[0])), strict=True):
            places = np.flatnonzero((first <= indices) & (indices < first + len(source)))
            found: dict[int, str] = {}
            images[places] = source.read(indices[places] - first, None if damaged is None else found)
            if damaged is not None:
                damaged |= {int(places[place]): message for place, message in found.items()}
