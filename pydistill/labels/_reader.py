"""The file of a `SoftLabelStore`, as data-loader workers read it: NumPy and `_host`, and no torch.

A `StoreFile`. All integers are little-endian::

    header      JSON: sizes, format, temperature, which images, and what the maker says about them
    classifier  float32 [C, D] and [C], of the format that keeps features only
    table       [epochs, blocks] entries: crc32 of a block's images and of its rows, number of rows, how far gradients
                of its labels are off, a check of these
    blocks      [epochs, blocks], each at a multiple of 64 bytes: images uint32 [batch_size], rows
                [batch_size, row_bytes]

A row is a label and the bytes of its augmentation. A block holds one written batch, in its order, and zeros behind it.
A write puts the block down, syncs, and only then writes its entry: a process that is killed at any moment leaves a file
that lacks at most the block under way, and writing that one again makes the file that it would have been.

Version 1 says nothing of gradients, and its "topk8" has the same step in all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pydistill import _host
from pydistill._store_file import StoreFile, check_of, round_up

FORMATS = ("fp32", "fp16", "bf16", "logits8", "features8", "topk", "topk8")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number of the formats that keep them as they come
ROW_STEP, CLASSIFIER = "row_step", "classifier"  # flags: "topk8" whose rows have steps of their own; "features8"

Format = Literal["fp32", "fp16", "bf16", "logits8", "features8", "topk", "topk8"]
Sources = Literal["batch", "images"]

_WITHOUT_ERRORS = np.dtype([(name, "<u4") for name in ("images", "rows", "count", "check")])
# the errors are float32, kept as their bits
_ENTRY = np.dtype([(name, "<u4") for name in ("images", "rows", "count", "fresh", "near", "check")])


def _count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _natural(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


_HEADER: dict[str, Callable[[Any], bool]] = {  # what each field has to be
    **dict.fromkeys(("num_images", "num_classes", "epochs", "batch_size", "blocks"), _count),
    "format": lambda value: value in FORMATS,
    **dict.fromkeys(("k", "group", "features", "record_bytes", "classifier_crc32"), _natural),
    "step": lambda value: isinstance(value, float) and value >= 0,
    "target": lambda value: value in ("logits", "probs"),
    "temperature": lambda value: isinstance(value, float) and value > 0,
    "sources": lambda value: value in ("batch", "images"),
    "images": lambda value: isinstance(value, list) and len(value) > 0,
    "metadata": lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class RowLayout:
    """What a row of bytes means: the label first, then the record, then zeros up to where its numbers may begin."""

    num_classes: int
    format: Format
    k: int  # 0 for all but the top-k formats
    step: float  # of the logarithms of "topk8", at most, else 0
    group: int  # numbers that share an offset and a step, of the linear formats, else 0
    features: int  # of "features8", else 0
    target: Literal["logits", "probs"]
    temperature: float
    record_bytes: int
    sources: Sources
    batch_size: int

    @property
    def codes(self) -> int:
        """Numbers of 8 bits, of the linear formats."""
        return self.features or self.num_classes

    @property
    def label_bytes(self) -> int:
        if self.k:
            return 4 + self.k * (3 if self.step else 4)
        if self.group:
            return 4 * -(-self.codes // self.group) + self.codes
        return BYTES[self.format] * self.num_classes

    @property
    def row_bytes(self) -> int:
        return round_up(self.label_bytes + self.record_bytes, BYTES.get(self.format, 2))


class LabelReader(StoreFile):
    """A label file, read where it is asked for; `SoftLabelStore` is what users open.

    The checksums of a block are verified the first time that an object reads from it. Pickled, it is opened again.

    A file that has become shorter than what is asked for is a ValueError; `pydistill._store_file` says up to where.
    """

    _kind, _magic, _version, _fields = "a label store", b"PYDLABEL", 2, _HEADER
    _flags = frozenset((ROW_STEP, CLASSIFIER))
    _rows: np.ndarray | None = None  # [epochs, blocks, batch_size, row_bytes], a view of the map

    def _open(self) -> None:
        super()._open()
        grid = (self.epochs, self.blocks)
        table = self._read(self._table_at, self.epochs * self.blocks * self._entry.itemsize)
        self._table = table.view(self._entry).reshape(grid)
        whole = (self._table["check"] == check_of(self._table)) & (self._table["count"] >= 1)
        self._whole = whole & (self._table["count"] <= self.batch_size)
        self._verified = np.zeros(grid, bool)
        self._places: dict[int, np.ndarray] = {}
        stride, first = self.layout.row_bytes, self._rows_at(0, 0)
        over = (self.blocks * self._block_bytes, self._block_bytes, stride, 1)
        self._rows = np.ndarray((*grid, self.batch_size, stride), np.uint8, self._bytes, first, over)

    def close(self) -> None:
        self._rows = None
        super().close()

    def _current(self, header: dict[str, Any], version: int) -> dict[str, Any]:
        if version == 1:
            relabelled = isinstance(header.get("metadata"), dict) and "relabel" in header["metadata"]
            sources = "images" if relabelled else "batch"
            header |= {"group": 0, "features": 0, "classifier_crc32": 0, "sources": sources, "flags": []}
        return header

    def _layout(self, start: int) -> None:
        header = self.header
        names = ("num_images", "num_classes", "epochs", "batch_size", "blocks", "format", "k", "target")
        for name in (*names, "record_bytes", "metadata"):
            setattr(self, name, header[name])
        self.T = header["temperature"]
        self.layout = RowLayout(**{name: header[name] for name in RowLayout.__dataclass_fields__})
        self.images = np.concatenate([np.arange(*run) for run in header["images"]])  # int64, ascending
        self._entry = _WITHOUT_ERRORS if self.version == 1 else _ENTRY
        self._fixed_at = round_up(start, 64)
        self._fixed_bytes = 4 * self.num_classes * (self.layout.features + 1) if self.layout.features else 0
        self._table_at = round_up(self._fixed_at + self._fixed_bytes, 64)
        self._blocks_at = round_up(self._table_at + self.epochs * self.blocks * self._entry.itemsize, 4096)
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
        self._check_epoch(epoch)
        return [self._ids_of(epoch, block).tolist() for block in self._blocks_of(epoch)]

    def places(self, epoch: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where labels stand: block * batch_size + row, int64 ``[n]``; errors as of `rows`."""
        return self._find(epoch, np.asarray(images))

    def rows(self, epoch: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of some images at an epoch, uint8 ``[n, row_bytes]``, a copy; nothing else of the file is decoded.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: a label is not there yet, or the block that it stands in is damaged.
        """
        blocks, inside = np.divmod(self._find(epoch, np.asarray(images)), self.batch_size)
        wanted = np.bincount(blocks) > 0  # up to the last block that is
        self._check_reaches(self._block_at(epoch, len(wanted)))
        for block in np.flatnonzero(wanted & ~self._verified[epoch, : len(wanted)]):
            self._check_crc("rows", epoch, block, _host.crc32(self._rows[epoch, block, : self._count(epoch, block)]))
            self._verified[epoch, block] = True
        return self._rows[epoch, blocks, inside]

    def classifier_bytes(self) -> np.ndarray:
        """The weight ``[C, D]`` and the bias ``[C]`` of "features8", uint8; ValueError where they are damaged."""
        data = self._read(self._fixed_at, self._fixed_bytes)
        wanted, found = self.header["classifier_crc32"], _host.crc32(data)
        if wanted != found:
            raise ValueError(f"{self.path}: the classifier is damaged: expected crc32 {wanted}, got {found}")
        return data

    def verify(self) -> None:
        """Reads everything; ValueError for the first block whose checksum is not that of its bytes."""
        if self.layout.features:
            self.classifier_bytes()
        for epoch in range(self.epochs):
            for block in self._blocks_of(epoch):
                self._ids_of(epoch, block)
                self._check_crc("rows", epoch, block, _host.crc32(self._rows_of(epoch, block)))

    def __len__(self) -> int:
        return len(self.images)

    def _blocks_of(self, epoch: int) -> list[int]:
        return np.flatnonzero(self._whole[epoch]).tolist()

    def _count(self, epoch: int, block: int) -> int:
        return int(self._table["count"][epoch, block])

    def _find(self, epoch: int, wanted: np.ndarray) -> np.ndarray:
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
        return found

    def _places_of(self, epoch: int) -> np.ndarray:
        """int64 ``[num_images]``: block * batch_size + row, -1 for no label; those of two epochs are kept."""
        self._check_epoch(epoch)
        self._check_open()
        if epoch not in self._places:
            places = np.full(self.num_images, -1, np.int64)
            for block in self._blocks_of(epoch):
                ids = self._ids_of(epoch, block)
                places[ids] = block * self.batch_size + np.arange(len(ids))
            while len(self._places) >= 2:
                self._places.pop(next(iter(self._places)))
            self._places[epoch] = places
        return self._places[epoch]

    def _block_at(self, epoch: int, block: int) -> int:
        return self._blocks_at + (epoch * self.blocks + block) * self._block_bytes

    def _rows_at(self, epoch: int, block: int) -> int:
        return self._block_at(epoch, block) + self._ids_bytes

    def _ids_of(self, epoch: int, block: int) -> np.ndarray:
        """uint32 ``[count]``, verified."""
        ids = self._read(self._block_at(epoch, block), 4 * self._count(epoch, block)).view("<u4")
        self._check_crc("images", epoch, block, _host.crc32(ids))
        return ids

    def _rows_of(self, epoch: int, block: int) -> np.ndarray:
        """uint8 ``[count, row_bytes]``, not verified."""
        shape = self._count(epoch, block), self.layout.row_bytes
        return self._read(self._rows_at(epoch, block), math.prod(shape)).reshape(shape)

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
