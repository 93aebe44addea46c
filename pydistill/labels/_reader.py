"""The file of a `SoftLabelStore`, as data-loader workers read it: NumPy and `_host`, and no torch.

A `MappedFile`. All integers are little-endian::

    header    JSON: sizes, format, temperature, which images, and what the maker says about them
    table     [epochs, blocks] entries: crc32 of a block's images and of its rows, number of rows, a check of these
    blocks    [epochs, blocks], each at a multiple of 64 bytes: images uint32 [batch_size], rows [batch_size, row_bytes]

A row is a label and the bytes of its augmentation. A block holds one written batch, in its order, and zeros behind it.
A write puts the block down, syncs, and only then writes its entry: a process that is killed at any moment leaves a file
that lacks at most the block under way, and writing that one again makes the file that it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pydistill import _host
from pydistill._mapped_file import MappedFile, check_of, round_up

ENTRY = np.dtype([(name, "<u4") for name in ("images", "rows", "count", "check")])
FORMATS = ("fp16", "bf16", "topk", "topk8")

Format = Literal["fp16", "bf16", "topk", "topk8"]


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
        return round_up(self.label_bytes + self.record_bytes, 2)


class LabelReader(MappedFile):
    """A label file, read through a memory map; `SoftLabelStore` is what users open.

    The checksums of a block are verified the first time that an object reads from it. Pickled, it is opened again.
    """

    _kind, _magic, _version, _fields = "a label store", b"PYDLABEL", 1, _HEADER

    def _open(self) -> None:
        super()._open()
        grid = (self.epochs, self.blocks)
        self._table = np.ndarray(grid, ENTRY, self._map, self._table_at).copy()
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

    def _layout(self, start: int) -> None:
        header = self.header
        names = ("num_images", "num_classes", "epochs", "batch_size", "blocks", "format", "k", "temperature", "target")
        for name in (*names, "record_bytes", "metadata"):
            setattr(self, name, header[name])
        fields = ("num_classes", "format", "k", "step", "target", "temperature", "record_bytes")
        self.layout = RowLayout(**{name: header[name] for name in fields})
        self.images = np.concatenate([np.arange(*run) for run in header["images"]])  # int64, ascending
        self._table_at = round_up(start, 64)
        self._blocks_at = round_up(self._table_at + self.epochs * self.blocks * ENTRY.itemsize, 4096)
        self._ids_bytes = round_up(4 * self.batch_size, 64)
        self._block_bytes = self._ids_bytes + round_up(self.batch_size * self.layout.row_bytes, 64)
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
        super().close()

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
