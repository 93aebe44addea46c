"""The file of a `SoftLabelStore`, as data-loader workers read it: NumPy and `_host`, and no torch.

The file has a fixed size from its creation on, and is sparse until labels arrive. All integers are little-endian::

    prefix    magic, version, length and crc32 of the header
    header    JSON: sizes, format, temperature, which images, and what the maker says about them
    table     [epochs, blocks] entries: crc32 of a block's images and of its rows, number of rows, a check of these
    blocks    [epochs, blocks], each at a multiple of 64 bytes: images uint32 [batch_size], rows [batch_size, row_bytes]

A row is a label and the bytes of its augmentation. A block holds one written batch, in its order, and zeros behind it.
A write puts the block down, syncs, and only then writes its entry: a process that is killed at any moment leaves a file
that lacks at most the block under way, and writing that one again makes the file that it would have been.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pydistill import _host

MAGIC, VERSION = b"PYDLABEL", 1
PREFIX = struct.Struct("<8sIII")  # magic, version, length and crc32 of the header
ENTRY = np.dtype([(name, "<u4") for name in ("images", "rows", "count", "check")])
FORMATS = ("fp16", "bf16", "topk", "topk8")

Format = Literal["fp16", "bf16", "topk", "topk8"]
PathLike = str | os.PathLike[str]


def _count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


_HEADER: dict[str, Callable[[Any], bool]] = {  # what each field has to be
    **dict.fromkeys(("num_images", "num_classes", "epochs", "batch_size", "blocks"), _count),
    "format": lambda value: value in FORMATS,
    "k": lambda value: isinstance(value, int) and value >= 0,
    "step": lambda value: isinstance(value, float) and value >= 0,
    "target": lambda value: value in ("logits", "probs"),
    "temperature": lambda value: isinstance(value, float) and value > 0,
    "record_bytes": lambda value: isinstance(value, int) and value >= 0,
    "images": lambda value: isinstance(value, list) and len(value) > 0,
    "metadata": lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class RowLayout:
    """What a row of bytes means: the label first, then the record, then a zero byte where the length would be odd."""

    num_classes: int
    format: Format
    k: int  # 0 for the dense formats
    step: float  # of the logarithms of "topk8", else 0
    target: Literal["logits", "probs"]
    temperature: float
    record_bytes: int

    @property
    def label_bytes(self) -> int:
        return 4 + self.k * (3 if self.step else 4) if self.k else 2 * self.num_classes

    @property
    def row_bytes(self) -> int:
        return -(-(self.label_bytes + self.record_bytes) // 2) * 2


class LabelReader:
    """A label file, read through a memory map; `SoftLabelStore` is what users open.

    The checksums of a block are verified the first time that an object reads from it. Pickled, it is opened again.
    """

    def __init__(self, path: PathLike, *, writable: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: expected a label store, found no file")
        self._file = self.path.open("r+b" if writable else "rb")
        self._writable, self._map = writable, None
        try:
            if writable:
                self._lock()
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(PREFIX.size)
        magic, version, length, checksum = PREFIX.unpack(prefix.ljust(PREFIX.size, b"\0"))
        if magic != MAGIC:
            got = f"{size} bytes that start with {prefix[:8].hex(' ') or 'nothing'}"
            raise ValueError(f"{self.path}: expected a label store, which starts with {MAGIC.hex(' ')}; got {got}")
        if version != VERSION:
            newer = ", which a newer pydistill reads" if version > VERSION else ""
            raise ValueError(f"{self.path}: expected a label store of version {VERSION}, got {version}{newer}")
        text = self._file.read(min(length, size))
        if len(text) != length:
            raise ValueError(f"{self.path}: expected a header of {length} bytes, it is truncated to {len(text)}")
        if (found := _host.crc32(text)) != checksum:
            raise ValueError(f"{self.path}: its header is damaged: expected crc32 {checksum}, got {found}")
        header = json.loads(text)
        for name, is_right in _HEADER.items():
            if not is_right(header.get(name, ...)):
                raise ValueError(f"{self.path}: its header has no right {name}, got {header.get(name)!r}")
        self._set_sizes(header, len(text))
        if size != self._size:
            what = "truncated" if size < self._size else "longer than it says"
            raise ValueError(f"{self.path}: expected {self._size} bytes as its header says, it is {what}: {size}")
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        grid = (self.epochs, self.blocks)
        table = np.frombuffer(self._map, ENTRY, self.epochs * self.blocks, self._table_at)
        self._table = table.reshape(grid).copy()
        here = {"buffer": self._map, "offset": self._blocks_at}
        over = (self.blocks * self._block_bytes, self._block_bytes)
        self._ids = np.ndarray((*grid, self.batch_size), "<u4", **here, strides=(*over, 4))
        here["offset"] += self._ids_bytes
        stride = self.layout.row_bytes
        self._rows = np.ndarray((*grid, self.batch_size, stride), np.uint8, **here, strides=(*over, stride, 1))
        whole = (self._table["check"] == check_of(self._table)) & (self._table["count"] >= 1)
        self._whole = whole & (self._table["count"] <= self.batch_size)
        self._verified = np.zeros(grid, bool)
        self._places: dict[int, np.ndarray] = {}

    def _set_sizes(self, header: dict[str, Any], header_bytes: int) -> None:
        self.header = header
        names = ("num_images", "num_classes", "epochs", "batch_size", "blocks", "format", "k", "temperature", "target")
        for name in (*names, "record_bytes", "metadata"):
            setattr(self, name, header[name])
        fields = ("num_classes", "format", "k", "step", "target", "temperature", "record_bytes")
        self.layout = RowLayout(**{name: header[name] for name in fields})
        self.images = np.concatenate([np.arange(*run) for run in header["images"]])  # int64, ascending
        self._table_at = _multiple(PREFIX.size + header_bytes, 64)
        self._blocks_at = _multiple(self._table_at + self.epochs * self.blocks * ENTRY.itemsize, 4096)
        self._ids_bytes = _multiple(4 * self.batch_size, 64)
        self._block_bytes = self._ids_bytes + _multiple(self.batch_size * self.layout.row_bytes, 64)
        self._size = self._blocks_at + self.epochs * self.blocks * self._block_bytes

    def holds(self, epoch: int, block: int) -> bool:
        """Whether batch number ``block`` of an epoch is there; a run that was killed goes on at the first that is not.

        Raises:
            IndexError: there is no such epoch or block.
        """
        self._check_epoch(epoch)
        if not 0 <= block < self.blocks:
            raise IndexError(f"{self.path}: block: expected one of 0..{self.blocks - 1}, got {block}")
        return bool(self._whole[epoch, block])

    @property
    def completed(self) -> int:
        """How many epochs, from the first on, have the labels of all images."""
        labelled = np.where(self._whole, self._table["count"], 0).sum(1) == len(self.images)
        return int(np.logical_and.accumulate(labelled).sum())

    def missing(self, epoch: int) -> np.ndarray:
        """The images, int64 ascending, whose labels an epoch lacks."""
        return self.images[self._places_of(epoch)[self.images] < 0]

    def check_complete(self, epochs: int | None = None) -> None:
        """ValueError where one of the first ``epochs`` epochs (by default all) lacks labels: names them, loses nothing.

        Raises:
            ValueError: labels are missing, or the store has fewer epochs.
        """
        wanted = self.epochs if epochs is None else epochs
        if wanted > self.epochs:
            raise ValueError(f"{self.path}: expected {wanted} epochs of labels, it is made for {self.epochs}")
        counts = np.where(self._whole[:wanted], self._table["count"][:wanted], 0).sum(1)
        lacking = np.flatnonzero(counts != len(self.images)).tolist()
        if lacking:
            images = f"{int(counts[lacking[0]])} of {len(self.images)} images"
            named = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
            raise ValueError(
                f"{self.path}: expected all of {wanted} epochs, {len(lacking)} lack labels ({named}): "
                f"epoch {lacking[0]} has those of {images}"
            )

    def batches(self, epoch: int) -> list[list[int]]:
        """The images of an epoch as they were written, batch after batch: what a ``DataLoader`` takes as batch_sampler.

        Records that speak of a place in their batch, as those of mixed images do, hold for these batches.
        """
        self._places_of(epoch)  # verifies the images
        return [self._ids[epoch, block, : self._count(epoch, block)].tolist() for block in self._blocks_of(epoch)]

    def rows(self, epoch: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of some images at an epoch, uint8 ``[n, row_bytes]``, a copy; nothing else of the file is decoded.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: a label is not there yet, or the block that it stands in is damaged.
        """
        wanted = np.asarray(images)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise ValueError(f"images: expected integers [n], got {wanted.dtype} {list(wanted.shape)}")
        places = self._places_of(epoch)
        wrong = (wanted < 0) | (wanted >= self.num_images)
        if wrong.any():
            got = wanted[wrong][0]
            raise IndexError(f"{self.path}: images: expected some of 0..{self.num_images - 1}, got {got}")
        found = places[wanted.astype(np.int64)]
        if (found < 0).any():
            lacking = wanted[found < 0]
            have = len(self._blocks_of(epoch))
            raise ValueError(
                f"{self.path}: epoch {epoch} lacks the labels of {lacking.size} of the {wanted.size} images asked for, "
                f"the first of them image {lacking[0]}; it has {have} of {self.blocks} blocks"
            )
        blocks, inside = np.divmod(found, self.batch_size)
        for block in np.flatnonzero(np.bincount(blocks, minlength=self.blocks)):
            self._verify_rows(epoch, block)
        return self._rows[epoch, blocks, inside]

    def verify(self) -> None:
        """Reads everything; ValueError for the first block whose checksum is not that of its bytes."""
        for epoch in range(self.epochs):
            self._places.pop(epoch, None)
            self._places_of(epoch)
            for block in self._blocks_of(epoch):
                self._verified[epoch, block] = False
                self._verify_rows(epoch, block)

    def close(self) -> None:
        self._ids = self._rows = None  # they hold the map
        if self._map is not None:
            self._map.close()
            self._map = None
        self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._writable:
            raise ValueError(f"{self.path}: a store that is open for writing stays in its process: open it again")
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LabelReader.__init__(self, state["path"])

    def __len__(self) -> int:
        return len(self.images)

    def _blocks_of(self, epoch: int) -> list[int]:
        return np.flatnonzero(self._whole[epoch]).tolist()

    def _count(self, epoch: int, block: int) -> int:
        return int(self._table["count"][epoch, block])

    def _places_of(self, epoch: int) -> np.ndarray:
        """int64 ``[num_images]``: block * batch_size + row, -1 for no label; those of two epochs are kept."""
        self._check_epoch(epoch)
        self._check_open()
        if epoch not in self._places:
            places = np.full(self.num_images, -1, np.int64)
            for block in self._blocks_of(epoch):
                count = self._count(epoch, block)
                ids = self._ids[epoch, block, :count]
                self._check_crc("images", epoch, block, _host.crc32(ids))
                places[ids] = block * self.batch_size + np.arange(count)
            while len(self._places) >= 2:
                self._places.pop(next(iter(self._places)))
            self._places[epoch] = places
        return self._places[epoch]

    def _verify_rows(self, epoch: int, block: int) -> None:
        if not self._verified[epoch, block]:
            rows = self._rows[epoch, block, : self._count(epoch, block)]
            self._check_crc("rows", epoch, block, _host.crc32(rows))
            self._verified[epoch, block] = True

    def _check_crc(self, what: str, epoch: int, block: int, found: int) -> None:
        wanted = int(self._table[what][epoch, block])
        if wanted != found:
            raise ValueError(
                f"{self.path}: the {what} of block {block} of epoch {epoch} are damaged: "
                f"expected crc32 {wanted}, got {found}"
            )

    def _check_epoch(self, epoch: int) -> None:
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"{self.path}: epoch: expected one of 0..{self.epochs - 1}, got {epoch}")

    def _check_open(self) -> None:
        if self._map is None:
            raise ValueError(f"{self.path}: the store is closed")

    def _lock(self) -> None:
        """Until the file is closed, or the process dies."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: expected a store that nobody writes to, another process does") from error


def check_of(entries: np.ndarray) -> np.ndarray:
    """What tells an entry from one that is missing or half written."""
    return ~(entries["images"] ^ entries["rows"] ^ entries["count"])


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
