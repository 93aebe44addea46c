"""Soft labels of every epoch and image, with what replays their augmentation, in one memory-mapped file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydistill import _host
from pydistill._atomic import PathLike, check_replaceable, replacing
from pydistill._mapped_file import check_of
from pydistill.labels._reader import ENTRY, FORMATS, Format, LabelReader
from pydistill.labels.records import pack
from pydistill.labels.soft_labels import SoftLabels

__all__ = ["SoftLabelStore"]

STEP = 1 / 16  # of "topk8": 255 steps reach e^-15.9 of the largest probability, and round by 3 % at most


class SoftLabelStore(LabelReader):
    """The product of relabelling (FKD: Shen and Xing, ECCV 2022; SRe2L: Yin et al., NeurIPS 2023), epoch by epoch.

    =========  =========================================================  ==============================
    format     what is kept of a label                                    bytes (C = 1000, k = 10)
    =========  =========================================================  ==============================
    "fp16"     the logits, or the probabilities                           2 C             (2000)
    "bf16"     the same, in bfloat16                                      2 C             (2000)
    "topk"     k classes and the mass of the others, float16              4 + 4 k         (44)
    "topk8"    the same, with logarithms in 8 bits                        4 + 3 k         (34)
    =========  =========================================================  ==============================

    A label takes 4 bytes besides for the number of its image, and a block of ``batch_size`` labels 16 for its
    checksums. `SoftLabels` says what a top-k label means. Dense logits serve any temperature; top-k labels are
    probabilities at the one that the store is made with.

    Reading touches the rows asked for and, the first time that an object meets a block, that block, whose checksum it
    verifies. A store is a context manager, and closes its file; one open for reading can be pickled, which opens it
    again, so that data-loader workers may hold it however they are started.

    Attributes:
        path: the file.
        num_images, num_classes, epochs, batch_size, format, k, temperature, target, record_bytes, metadata: as given
            to `create`.
        images: int64, ascending, the images that have labels in this file: all, or those of a shard.
        blocks: blocks an epoch.
        layout: what the bytes of a row mean.

    Args:
        path: a file that `create`, `merge` or `import_fkd` made.
        writable: whether `write` may be called; one process at a time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, damaged in its header, of a newer version, or being written.
    """

    num_images: int
    num_classes: int
    epochs: int
    batch_size: int
    blocks: int
    format: Format
    k: int
    temperature: float
    target: Literal["logits", "probs"]
    record_bytes: int
    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: PathLike, *, writable: bool = False) -> SoftLabelStore:
        """Opens a file; the same as calling the class."""
        return cls(path, writable=writable)

    @classmethod
    def create(
        cls,
        path: PathLike,
        *,
        num_images: int,
        num_classes: int,
        epochs: int,
        format: Format = "topk8",
        k: int = 10,
        temperature: float = 1.0,
        target: Literal["logits", "probs"] = "logits",
        record_bytes: int = 0,
        batch_size: int = 1024,
        images: Sequence[int] | np.ndarray | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> SoftLabelStore:
        """Makes an empty store, open for `write`; its bytes depend on the arguments alone.

        Args:
            path: the file to make.
            num_images, num_classes, epochs: at least one of each; up to 65536 classes in the top-k formats.
            format: see the class.
            k: classes kept, 1 to num_classes; of the top-k formats only.
            temperature: at which the labels are trained on, and top-k probabilities are taken of logits.
            target: what `write` gets: "logits", or "probs" at that temperature.
            record_bytes: bytes of an image's augmentation, stored as they come; ``CROP_BYTES`` (29) for each part of
                the records of `pydistill.augment.multi_crop`, of which mixup and cutmix have two.
            batch_size: labels a `write`; all but an epoch's last have as many.
            images: those of a shard, which `merge` joins with others; by default all.
            metadata: what JSON can hold: teacher, data set, seed.
            overwrite: whether a file at ``path`` may be replaced.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            ValueError: a number is out of range, or an unknown format or target.
        """
        _check_at_least(1, num_images=num_images, num_classes=num_classes, epochs=epochs, batch_size=batch_size)
        _check_at_least(0, record_bytes=record_bytes)
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
        if target not in ("logits", "probs"):
            raise ValueError(f"target: expected 'logits' or 'probs', got {target!r}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        sparse = format.startswith("topk")
        if sparse and not 1 <= k <= num_classes:
            raise ValueError(f"k: expected 1 to the {num_classes} classes, got {k}")
        if sparse and num_classes > 65536:
            raise ValueError(f"num_classes: expected up to 65536 for {format!r}, got {num_classes}")
        shard = _shard(images, num_images)
        header = {
            "num_images": int(num_images),
            "num_classes": int(num_classes),
            "epochs": int(epochs),
            "batch_size": int(batch_size),
            "blocks": -(-sum(stop - start for start, stop in shard) // batch_size),
            "format": format,
            "k": int(k) if sparse else 0,
            "step": STEP if format == "topk8" else 0.0,
            "target": target,
            "temperature": float(temperature),
            "record_bytes": int(record_bytes),
            "images": shard,
            "metadata": dict(metadata or {}),
        }
        path = Path(path)
        check_replaceable(path, overwrite)
        cls._make(path, header)
        return cls(path, writable=True)

    def write(
        self,
        epoch: int,
        images: Sequence[int] | np.ndarray | Tensor,
        labels: Tensor | np.ndarray,
        records: Tensor | np.ndarray | None = None,
    ) -> None:
        """Adds the labels of a batch; on disk when it returns, all of it or nothing.

        Of equal logits the lower class is kept. Equal arguments give equal bytes, over runs and thread counts.

        Args:
            epoch: 0..epochs - 1, in any order.
            images: ``batch_size`` different ones without labels at this epoch, or all that are left of them.
            labels: ``[n, num_classes]``, finite: logits or probabilities, as ``target`` says. Taken as float32.
            records: uint8 ``[n, record_bytes]``, or float32 ``[n, P, 14]`` of `pydistill.augment.MultiCrop`, which
                `SoftLabels.crops` gives back to the bit.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: the store is open for reading only, an argument is not as said, or a label is not finite, no
                distribution, or too large for float16. Nothing is written then.
        """
        self._check_writable()
        self._check_epoch(epoch)
        ids = self._check_images(epoch, np.asarray(images))
        rows = np.zeros((len(ids), self.layout.row_bytes), np.uint8)
        size = self.layout.label_bytes
        rows[:, :size] = self._encode(labels, len(ids))
        rows[:, size : size + self.record_bytes] = self._check_records(records, len(ids))
        self._append(epoch, ids, rows)

    def read(self, epoch: int, images: Sequence[int] | np.ndarray | Tensor) -> SoftLabels:
        """The labels and records of some images at an epoch.

        Args:
            epoch: 0..epochs - 1.
            images: integers ``[B]``, in any order.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: a label is not there yet, or the block that it stands in is damaged.
        """
        ids = np.asarray(images)
        rows = torch.from_numpy(self.rows(epoch, ids))
        return SoftLabels(torch.from_numpy(ids.astype(np.int64)), rows, self.layout, epoch)

    @classmethod
    def merge(cls, paths: Sequence[PathLike], path: PathLike, *, overwrite: bool = False) -> SoftLabelStore:
        """Makes one store of shards, such as the ranks of a distributed run write; the shards stay.

        They may share the images or the epochs among them. Every shard is verified: its checksums are right, it is made
        as the others are, no label stands in two of them, and together they have all labels. The order of the paths
        does not matter; shards by epochs merge into the very file that one process would have written.

        Args:
            paths: shards of one relabelling.
            path: the store to make, atomically.
            overwrite: whether a file at ``path`` may be replaced.

        Returns:
            The store, open for reading.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            FileNotFoundError, ValueError: a shard is not there or not as said, or labels are missing; names them. No
                file is made then.
        """
        path, shards = Path(path), []
        if not paths:
            raise ValueError("paths: expected a shard or more, got none")
        check_replaceable(path, overwrite)
        with ExitStack() as opened, replacing(path, "merge") as partial:
            for each in paths:
                shards.append(opened.enter_context(cls(each)))
                _check_alike(shards[0], shards[-1])
                shards[-1].verify()
            images = np.unique(np.concatenate([shard.images for shard in shards]))
            parts = [_parts(shards, epoch, images) for epoch in range(shards[0].epochs)]
            blocks = max(map(len, parts))
            cls._make(partial, {**shards[0].header, "blocks": blocks, "images": _runs(images)})
            with cls(partial, writable=True) as store:
                for epoch, blocks_of_epoch in enumerate(parts):
                    for shard, block in blocks_of_epoch:
                        count = shard._count(epoch, block)
                        store._append(epoch, shard._ids[epoch, block, :count], shard._rows[epoch, block, :count])
        return cls(path)

    def __repr__(self) -> str:
        form = f"{self.format}, k={self.k}" if self.k else self.format
        return f"SoftLabelStore({str(self.path)!r}, [{self.epochs}, {len(self)}, {self.num_classes}], {form})"

    def _append(self, epoch: int, ids: np.ndarray, rows: np.ndarray) -> None:
        """A whole block, so that nothing is left of one that was cut off; then its entry."""
        block, count = int(np.flatnonzero(~self._whole[epoch])[0]), len(ids)
        data = np.zeros(self._block_bytes, np.uint8)
        data[: 4 * count].view("<u4")[:] = ids
        data[self._ids_bytes : self._ids_bytes + rows.size] = rows.reshape(-1)
        entry = np.zeros((), ENTRY)
        entry["images"] = _host.crc32(data[: 4 * count])
        entry["rows"] = _host.crc32(data[self._ids_bytes : self._ids_bytes + rows.size])
        entry["count"] = count
        entry["check"] = check_of(entry)
        number = epoch * self.blocks + block
        self._write(self._blocks_at + number * self._block_bytes, data.tobytes())
        self._sync()
        self._write(self._table_at + number * ENTRY.itemsize, entry.tobytes())
        self._sync()
        self._table[epoch, block] = entry
        self._whole[epoch, block] = True
        if epoch in self._places:
            self._places[epoch][ids] = block * self.batch_size + np.arange(count)

    def _encode(self, labels: Tensor | np.ndarray, n: int) -> np.ndarray:
        values = torch.as_tensor(labels, device="cpu").detach().to("cpu", torch.float32).contiguous()
        if values.shape != (n, self.num_classes):
            raise ValueError(
                f"labels: expected [{n}, {self.num_classes}] of the store's classes, got {list(values.shape)}"
            )
        probs = self.target == "probs"
        if self.k:
            try:
                return _host.encode_topk(values.numpy(), self.k, self.layout.step, probs, self.temperature)
            except ValueError as error:
                raise ValueError(f"labels: {error}") from error
        wrong = ~values.isfinite().all(1)
        if probs:
            wrong |= (values < 0).any(1) | ((values.sum(1) - 1).abs() > 1e-2)
        dense = values.to(torch.float16 if self.format == "fp16" else torch.bfloat16)
        wrong |= ~dense.isfinite().all(1)
        if wrong.any():
            wanted = "probabilities that add up to one" if probs else f"finite numbers that {self.format} can hold"
            raise ValueError(f"labels: row {int(wrong.nonzero()[0])}: expected {wanted}")
        return dense.view(torch.uint8).numpy()

    def _check_images(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"images: expected integers [n], got {ids.dtype} {list(ids.shape)}")
        if (strange := np.setdiff1d(ids, self.images)).size:
            raise IndexError(f"{self.path}: images: expected some of the store's {len(self)}, got {strange[0]}")
        if len(np.unique(ids)) != len(ids):
            raise ValueError("images: expected different ones, got one twice")
        places = self._places_of(epoch)
        if (there := ids[places[ids] >= 0]).size:
            raise ValueError(f"{self.path}: image {there[0]} has its label of epoch {epoch} already")
        left = int((places[self.images] < 0).sum())
        if len(ids) != min(left, self.batch_size):
            raise ValueError(
                f"images: expected {min(left, self.batch_size)}, for {left} lack labels at epoch {epoch} and the store "
                f"takes {self.batch_size} at a time, got {len(ids)}"
            )
        return ids.astype(np.int64)

    def _check_records(self, records: Tensor | np.ndarray | None, n: int) -> np.ndarray:
        if records is None:
            records = np.zeros((n, 0), np.uint8)
        if isinstance(records, Tensor) and records.is_floating_point():
            records = pack(records)
        given = records.cpu().numpy() if isinstance(records, Tensor) else np.asarray(records)
        if given.dtype != np.uint8 or given.shape != (n, self.record_bytes):
            got = f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"records: expected uint8 [{n}, {self.record_bytes}], got {got}")
        return given


def _shard(images: Sequence[int] | np.ndarray | None, num_images: int) -> list[list[int]]:
    if images is None:
        return [[0, num_images]]
    ids = np.unique(np.asarray(images))
    if len(ids) != len(images) or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"images: expected different integers, one or more, got {images!r:.60}")
    if ids[0] < 0 or ids[-1] >= num_images:
        raise ValueError(f"images: expected some of 0..{num_images - 1}, got {ids[0]} to {ids[-1]}")
    return _runs(ids)


def _runs(ids: np.ndarray) -> list[list[int]]:
    """Ascending integers as [start, stop) of consecutive ones."""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(ids, cuts)]


def _check_alike(first: LabelReader, other: LabelReader) -> None:
    for name, wanted in first.header.items():
        if name not in ("blocks", "images") and other.header[name] != wanted:
            raise ValueError(
                f"{other.path}: {name}: expected {wanted!r} as {first.path} has, got {other.header[name]!r}"
            )


def _parts(shards: list[SoftLabelStore], epoch: int, images: np.ndarray) -> list[tuple[SoftLabelStore, int]]:
    """The blocks of an epoch, with whose they are, in an order of their own; ValueError for labels twice or missing."""
    held = [(shard, block) for shard in shards for block in shard._blocks_of(epoch)]
    ids = [shard._ids[epoch, block, : shard._count(epoch, block)] for shard, block in held]
    found, counts = np.unique(np.concatenate([np.zeros(0, "<u4"), *ids]), return_counts=True)
    if (counts > 1).any():
        image = found[counts > 1][0]
        raise ValueError(f"paths: expected shards without common labels, image {image} has two at epoch {epoch}")
    if len(found) < len(images):
        lacking = np.setdiff1d(images, found)
        raise ValueError(
            f"paths: expected all labels in the shards, epoch {epoch} lacks those of {len(lacking)} of {len(images)} "
            f"images, the first of them image {lacking[0]}"
        )
    first = {
        shard: min(int(each.min()) for (of, _), each in zip(held, ids, strict=True) if of is shard) for shard, _ in held
    }
    return sorted(held, key=lambda part: (first[part[0]], part[1]))


def _check_at_least(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
