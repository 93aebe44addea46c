"""The file of a `SoftLabelStore`, as data-loader workers read it: NumPy and `_host`, without torch.

A `StoreFile`. All integers are little-endian::

    header      JSON: sizes, format, temperature, which images, and the maker's metadata
    classifier  float32 [C, D] and [C], only in the format that keeps features
    table       [epochs, blocks] entries: crc32 of a block's images and of its rows, number of rows, gradient errors of
                its labels, a check of these
    blocks      [epochs, blocks], each at a multiple of 64 bytes: images uint32 [batch_size], rows
                [batch_size, row_bytes]

A row is a label and the bytes of its augmentation. A block holds one written batch, in its order, padded with zeros.
A write stores the block, syncs, and only then writes its entry: a process that is killed at any moment leaves a file
that lacks at most the block in progress, and writing that block again gives the same file as without interruption.

Version 1 has no gradient errors, and its "topk8" has the same step in all rows.
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
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # per number, of the formats that keep numbers unchanged
ROW_STEP, CLASSIFIER = "row_step", "classifier"  # flags: "topk8" with a step per row; "features8"

Format = Literal["fp32", "fp16", "bf16", "logits8", "features8", "topk", "topk8"]
Sources = Literal["batch", "images"]

_WITHOUT_ERRORS = np.dtype([(name, "<u4") for name in ("images", "rows", "count", "check")])
# the errors are float32, stored as bits
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
    """The layout of a row of bytes: the label, then the record, then zeros for alignment."""

    num_classes: int
    format: Format
    k: int  # 0 for all but the top-k formats
    step: float  # largest step of the logarithms of "topk8", else 0
    group: int  # numbers that share an offset and a step in the linear formats, else 0
    features: int  # of "features8", else 0
    target: Literal["logits", "probs"]
    temperature: float
    record_bytes: int
    sources: Sources
    batch_size: int

    @property
    def codes(self) -> int:
        """How many 8-bit numbers a row of the linear formats has."""
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
    """A label file, read on demand; `SoftLabelStore` is what users open.

    The checksums of a block are verified the first time that an object reads from it. Unpickling opens the file again.

    A file that has become too short for what is asked for is a ValueError; see `pydistill._store_file` for its limits.
    """

    _kind, _magic, _version, _fields = "a label store", b"PYDLABEL", 2, _HEADER
    _flags = frozenset((ROW_STEP, CLASSIFIER))

    num_images: int
    num_classes: int
    epochs: int
    batch_size: int
    blocks: int
    format: Format
    k: int
    T: float
    target: Literal["logits", "probs"]
    record_bytes: int
    metadata: dict[str, Any]
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
        """Whether batch number ``block`` of an epoch is there; a killed run continues at the first that is not.

        Raises:
            IndexError: there is no such epoch or block.
        """
        self._check_epoch(epoch)
        if not 0 <= block < self.blocks:
            raise IndexError(f"{self.path}: block: expected one of 0..{self.blocks - 1}, got {block}")
        return bool(self._whole[epoch, block])

    @property
    def completed(self) -> int:
        """How many epochs, counted from the first, have the labels of all images."""
        labelled = np.where(self._whole, self._table["count"], 0).sum(1) == len(self.images)
        return int(np.logical_and.accumulate(labelled).sum())

    def missing(self, epoch: int) -> np.ndarray:
        """The images, int64 ascending, whose labels an epoch lacks."""
        return self.images[self._places_of(epoch)[self.images] < 0]

    def check_complete(self, epochs: int | None = None) -> None:
        """ValueError naming those of the first ``epochs`` epochs (by default all) that lack labels; changes nothing.

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
        """The images of an epoch as they were written, batch by batch: a ``DataLoader``'s batch_sampler.

        Records that refer to a place in their batch, as those of mixed images do, are valid for these batches.
        """
        self._check_epoch(epoch)
        return [self._ids_of(epoch, block).tolist() for block in self._blocks_of(epoch)]

    def places(self, epoch: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where labels are stored: block * batch_size + row, int64 ``[n]``; errors as for `rows`."""
        return self._find(epoch, np.asarray(images))

    def rows(self, epoch: int, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of some images at an epoch, uint8 ``[n, row_bytes]``, a copy; nothing else of the file is decoded.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: a label is not there yet, or its block is damaged.
        """
        blocks, inside = np.divmod(self._find(epoch, np.asarray(images)), self.batch_size)
        wanted = np.bincount(blocks) > 0  # up to the last wanted block
        self._check_reaches(self._block_at(epoch, len(wanted)))
        assert self._rows is not None
        for block in np.flatnonzero(wanted & ~self._verified[epoch, : len(wanted)]).tolist():
            self._check_crc("rows", epoch, block, _host.crc32(self._rows[epoch, block, : self._count(epoch, block)]))
            self._verified[epoch, block] = True
        return self._rows[epoch, blocks, inside]

    def classifier_bytes(self) -> np.ndarray:
        """The weight ``[C, D]`` and the bias ``[C]`` of "features8", uint8; ValueError if they are damaged."""
        data = self._read(self._fixed_at, self._fixed_bytes)
        wanted, found = self.header["classifier_crc32"], _host.crc32(data)
        if wanted != found:
            raise ValueError(f"{self.path}: the classifier is damaged: expected crc32 {wanted}, got {found}")
        return data

    def verify(self) -> None:
        """Reads everything; ValueError for the first block whose checksum does not match its bytes."""
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
        """int64 ``[num_images]``: block * batch_size + row, -1 for no label; cached for two epochs."""
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
        if not isinstance(epoch, (int, np.integer)):
            raise TypeError(f"epoch: expected a whole number, got {epoch!r}")
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"{self.path}: epoch: expected one of 0..{self.epochs - 1}, got {epoch}")
