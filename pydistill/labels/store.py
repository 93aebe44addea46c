"""Soft labels of every epoch and image, with the records of their augmentation, in one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydistill import _host
from pydistill._arguments import check_choice, check_whole
from pydistill._atomic import PathLike, check_replaceable, replacing
from pydistill._renamed import renamed, warn
from pydistill._store_file import check_of
from pydistill.labels import gradient_error, linear8
from pydistill.labels._reader import CLASSIFIER, FORMATS, ROW_STEP, Format, LabelReader, Sources
from pydistill.labels.gradient_error import GradientError
from pydistill.labels.records import pack
from pydistill.labels.soft_labels import DTYPES, SoftLabels

__all__ = ["SoftLabelStore"]

STEP = 1 / 16  # largest of "topk8": 255 steps reach e^-15.9 of the largest probability, and round by 3 % at most

_TELL = 0.1  # least error at which a store that is being written warns
_log = logging.getLogger("pydistill")


class SoftLabelStore(LabelReader):
    """The product of relabelling (FKD: Shen and Xing, ECCV 2022; SRe2L: Yin et al., NeurIPS 2023), epoch by epoch.

    ===========  =============================================================  ==========================
    format       what is kept of a label                                        bytes (C = 1000, k = 10)
    ===========  =============================================================  ==========================
    "fp32"       the logits, or the probabilities                               4 C                 (4000)
    "fp16"       the same, in float16                                           2 C                 (2000)
    "bf16"       the same, in bfloat16                                          2 C                 (2000)
    "logits8"    the logits in 8 bits, linear per group of 32 classes           C + 4 ceil(C / 32)  (1128)
    "features8"  the teacher's D features in 8 bits; its last layer once        D + 4       (516 of D=512)
    "topk"       k classes and the mass of the others, float16                  4 + 4 k               (44)
    "topk8"      the same, with logarithms in 8 bits                            4 + 3 k               (34)
    ===========  =============================================================  ==========================

    A label takes 4 more bytes for the number of its image, and a block of ``batch_size`` labels 24 for its
    checksums and errors. `SoftLabels` says what a top-k label means. Logits and features serve any temperature; top-k
    labels are probabilities at the temperature of the store. The cost of a format depends on that temperature:
    `gradient_error` is measured while labels are written. At high T the top-k formats lose most of the gradient, since
    it comes from the classes that they omit.

    Reading touches the rows asked for and, the first time that an object meets a block, that whole block, to verify
    its checksum. A store is a context manager that closes its file; one open for reading can be pickled, which opens
    it again, so that data-loader workers may hold it however they are started.

    Attributes:
        path: the file.
        num_images, num_classes, epochs, batch_size, format, k, T, target, record_bytes, metadata: as given
            to `create`.
        images: int64, ascending, the images that have labels in this file: all, or those of a shard.
        blocks: blocks per epoch.
        layout: what the bytes of a row mean.
        version: of the file; version 1 has no gradient errors.

    Args:
        path: a file that `create`, `merge` or `import_fkd` made.
        writable: whether `write` may be called; one process at a time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, damaged in its header, of a newer version, or being written.
    """

    _told = False

    @property
    def temperature(self) -> float:
        """The former name of ``T``."""
        warn("SoftLabelStore.temperature is called T now")
        return self.T

    @classmethod
    def open(cls, path: PathLike, *, writable: bool = False) -> SoftLabelStore:
        """Opens a file; the same as calling the class."""
        return cls(path, writable=writable)

    @classmethod
    @renamed(temperature="T")
    def create(
        cls,
        path: PathLike,
        *,
        num_images: int,
        num_classes: int,
        epochs: int,
        format: Format = "fp16",
        k: int = 10,
        T: float = 1.0,
        target: Literal["logits", "probs"] = "logits",
        classifier: tuple[Tensor, Tensor | None] | None = None,
        record_bytes: int = 0,
        sources: Sources = "batch",
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
            T: the temperature at which the labels are trained on, and top-k probabilities are taken of logits.
            target: what `write` gets: "logits", or "probs" at that temperature. The formats in 8 bits that keep all
                classes take logits.
            classifier: of "features8", and of that format only: the weight ``[num_classes, D]`` and the bias
                ``[num_classes]`` (or None) of the teacher's last layer, kept as float32. `write` gets its inputs.
            record_bytes: bytes of an image's augmentation, stored as they come; ``CROP_BYTES`` (29) for each part of
                the records of `pydistill.ops.multi_crop`, of which mixup and cutmix have two.
            sources: what the records of multi_crop name: places in the "batch" that is written, or "images" of the set.
            batch_size: labels per `write`; only an epoch's last may have fewer.
            images: those of a shard, which `merge` joins with others; by default all.
            metadata: what JSON can hold: teacher, data set, seed.
            overwrite: whether a file at ``path`` may be replaced.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            ValueError: a number is out of range, an unknown format, target or sources, or a classifier that does not
                fit.
        """
        _check_at_least(1, num_images=num_images, num_classes=num_classes, epochs=epochs, batch_size=batch_size)
        _check_at_least(0, record_bytes=record_bytes)
        check_choice("format", format, FORMATS)
        check_choice("target", target, ("logits", "probs"))
        if not isinstance(T, (int, float)) or not 0 < T < float("inf"):
            raise ValueError(f"T: expected a positive number, got {T!r}")
        check_choice("sources", sources, ("batch", "images"))
        if target == "probs" and format in ("logits8", "features8"):
            raise ValueError(f"target: expected 'logits' for {format!r}, got 'probs'")
        layer = _check_classifier(classifier, format, num_classes)
        sparse, features = format.startswith("topk"), layer[0].shape[1] if layer else 0
        fixed = b"".join(each.numpy().tobytes() for each in layer)
        flags = {"topk8": [ROW_STEP], "features8": [CLASSIFIER]}.get(format, [])
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
            "group": {"logits8": linear8.CLASSES, "features8": features}.get(format, 0),
            "features": features,
            "classifier_crc32": _host.crc32(np.frombuffer(fixed, np.uint8)),
            "flags": flags,
            "target": target,
            "temperature": float(T),
            "record_bytes": int(record_bytes),
            "sources": sources,
            "images": shard,
            "metadata": dict(metadata or {}),
        }
        path = Path(path)
        check_replaceable(path, overwrite)
        cls._make(path, header, fixed)
        return cls(path, writable=True)

    def write(
        self,
        epoch: int,
        images: Sequence[int] | np.ndarray | Tensor,
        labels: Tensor | np.ndarray,
        records: Tensor | np.ndarray | None = None,
    ) -> None:
        """Adds the labels of a batch; all or nothing, on disk when it returns.

        Of equal logits the lower class is kept. Equal arguments give equal bytes, across runs and thread counts.

        Args:
            epoch: 0..epochs - 1, in any order.
            images: ``batch_size`` different ones without labels at this epoch, or all that are left of them.
            labels: ``[n, num_classes]``, finite: logits or probabilities, according to ``target``; for "features8" the
                classifier's inputs ``[n, D]``. Converted to float32.
            records: uint8 ``[n, record_bytes]``, or float32 ``[n, P, 14]`` of `pydistill.augment.MultiCrop`, which
                `SoftLabels.crops` gives back to the bit.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: the store is open for reading only, an argument is not as described, or a label is not finite,
                not a distribution, or too large for the format. Then nothing is written.
        """
        self._check_writable()
        self._check_epoch(epoch)
        ids = self._check_images(epoch, np.asarray(images))
        rows = np.zeros((len(ids), self.layout.row_bytes), np.uint8)
        size = self.layout.label_bytes
        values = self._check_labels(labels, len(ids))
        rows[:, :size] = self._encode(values)
        rows[:, size : size + self.record_bytes] = self._check_records(records, len(ids))
        self._append(epoch, ids, rows, None if self.version == 1 else self._measure(values, rows))

    def read(self, epoch: int, images: Sequence[int] | np.ndarray | Tensor) -> SoftLabels:
        """The labels and records of some images at an epoch.

        Args:
            epoch: 0..epochs - 1.
            images: integers ``[B]``, in any order.

        Raises:
            IndexError: there is no such epoch or image.
            ValueError: a label is not there yet, or its block is damaged.
        """
        ids = np.asarray(images)
        return self._labels(ids, self.rows(epoch, ids), epoch)

    @property
    def gradient_error(self) -> GradientError | None:
        """The cost of the format, see `GradientError`: the quadratic mean over what is written so far.

        It was measured when the labels were written, on up to 64 of each batch, against the labels as given.
        None if nothing is written, and for files of version 1.
        """
        if self.version == 1 or not self._whole.any():
            return None
        squares = [
            np.square(self._table[name][self._whole].view(np.float32), dtype=float) for name in ("fresh", "near")
        ]
        known = ~np.isnan(squares[0])  # NaN: from merged shards of version 1
        return GradientError(*(float(np.sqrt(each[known].mean())) for each in squares)) if known.any() else None

    @cached_property
    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """For "features8", float32: the weight ``[num_classes, D]`` and bias ``[num_classes]`` shared by all labels.

        Raises:
            ValueError: they are damaged.
        """
        if not self.layout.features:
            return None
        numbers = torch.frombuffer(self.classifier_bytes(), dtype=torch.float32).share_memory_()  # with data loaders
        weight, bias = numbers.split([numbers.numel() - self.num_classes, self.num_classes])
        return weight.view(self.num_classes, -1), bias

    @classmethod
    def merge(cls, paths: Sequence[PathLike], path: PathLike, *, overwrite: bool = False) -> SoftLabelStore:
        """Makes one store from shards, such as those written by the ranks of a distributed run; the shards stay.

        They may divide the images or the epochs among them. Every shard is verified: its checksums are right, its
        options are those of the others, no label is in two of them, and together they have all labels. The order of
        the paths does not matter; shards by epochs merge into exactly the file that one process would have written.

        Args:
            paths: shards of one relabelling.
            path: the store to make, atomically.
            overwrite: whether a file at ``path`` may be replaced.

        Returns:
            The store, open for reading.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            FileNotFoundError, ValueError: a shard is missing or not as described, or labels are missing; names them.
                Then no file is made.
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
            fixed = bytes(shards[0].classifier_bytes()) if shards[0].layout.features else b""
            cls._make(partial, {**shards[0].header, "blocks": blocks, "images": _runs(images)}, fixed)
            with cls(partial, writable=True) as store:
                for epoch, blocks_of_epoch in enumerate(parts):
                    for shard, block in blocks_of_epoch:
                        ids, rows = shard._ids_of(epoch, block), shard._rows_of(epoch, block)
                        store._append(epoch, ids, rows, shard._error_of(epoch, block))
        return cls(path)

    def __repr__(self) -> str:
        form = f"{self.format}, k={self.k}" if self.k else self.format
        error = f", gradient error {error}" if (error := self.gradient_error) else ""
        return f"SoftLabelStore({str(self.path)!r}, [{self.epochs}, {len(self)}, {self.num_classes}], {form}{error})"

    def _labels(self, ids: np.ndarray, rows: np.ndarray, epoch: int) -> SoftLabels:
        images = torch.from_numpy(ids.astype(np.int64))
        return SoftLabels(images, torch.from_numpy(rows), self.layout, epoch, classifier=self.classifier)

    def _measure(self, values: Tensor, rows: np.ndarray) -> GradientError:
        """The error on rows spread evenly over a batch; warns once per object if it is large."""
        some = np.linspace(0, len(rows) - 1, min(len(rows), gradient_error.ROWS)).astype(np.int64)
        given, labels, kept = values[some].double(), self._labels(some, rows[some], 0), None
        if self.target == "probs":
            given /= given.sum(1, keepdim=True)
            logarithms = given.clamp(min=1e-12).log()
        else:
            if labels.classifier is not None:
                weight, bias = (each.double() for each in labels.classifier)
                given, kept = (each @ weight.T + bias for each in (given, labels.features.double()))
            elif not self.k:
                kept = labels.dense.double()
            logarithms = given / self.T
            given = logarithms.softmax(1)
        kept = labels.densify().double() if kept is None else (kept / self.T).softmax(1)
        error = gradient_error.measure(given, kept, logarithms)
        if max(error) >= _TELL and not self._told:
            self._told = True
            form = f"{self.format} with k={self.k} of {self.num_classes} classes" if self.k else self.format
            _log.warning("%s: %s at temperature %g changes gradients by %s", self.path, form, self.T, error)
        return error

    def _error_of(self, epoch: int, block: int) -> GradientError:
        if self.version == 1:
            return GradientError(np.nan, np.nan)
        return GradientError(*(float(self._table[name][epoch, block].view(np.float32)) for name in ("fresh", "near")))

    def _append(self, epoch: int, ids: np.ndarray, rows: np.ndarray, error: GradientError | None) -> None:
        """Writes a whole block, so that nothing remains of an interrupted one; then its entry."""
        block, count = int(np.flatnonzero(~self._whole[epoch])[0]), len(ids)
        data = np.zeros(self._block_bytes, np.uint8)
        data[: 4 * count].view("<u4")[:] = ids
        data[self._ids_bytes : self._ids_bytes + rows.size] = rows.reshape(-1)
        entry = np.zeros((), self._entry)
        entry["images"] = _host.crc32(data[: 4 * count])
        entry["rows"] = _host.crc32(data[self._ids_bytes : self._ids_bytes + rows.size])
        entry["count"] = count
        if error is not None:
            entry["fresh"], entry["near"] = np.array(error, np.float32).view(np.uint32)
        entry["check"] = check_of(entry)
        number = epoch * self.blocks + block
        self._write(self._blocks_at + number * self._block_bytes, data.tobytes())
        self._sync()
        self._write(self._table_at + number * self._entry.itemsize, entry.tobytes())
        self._sync()
        self._table[epoch, block] = entry
        self._whole[epoch, block] = True
        if epoch in self._places:
            self._places[epoch][ids] = block * self.batch_size + np.arange(count)

    def _check_labels(self, labels: Tensor | np.ndarray, n: int) -> Tensor:
        values = torch.as_tensor(labels, device="cpu").detach().to("cpu", torch.float32).contiguous()
        features = self.layout.features
        wanted, what = (features, "classifier's inputs") if features else (self.num_classes, "classes")
        if values.shape != (n, wanted):
            raise ValueError(f"labels: expected [{n}, {wanted}] of the store's {what}, got {list(values.shape)}")
        return values

    def _encode(self, values: Tensor) -> np.ndarray:
        probs, layout = self.target == "probs", self.layout
        if self.k:
            how = (self.k, layout.step, probs, self.T, ROW_STEP in self.header["flags"])
            try:
                return _host.encode_topk(values.numpy(), *how)
            except ValueError as error:
                raise ValueError(f"labels: {error}") from error
        wrong = ~values.isfinite().all(1)
        if probs:
            wrong |= (values < 0).any(1) | ((values.sum(1) - 1).abs() > 1e-2)
        if layout.group:
            packed = linear8.pack(values.numpy(), layout.group)
            lines = torch.from_numpy(packed)[:, : layout.label_bytes - layout.codes].contiguous().view(torch.float16)
            wrong |= ~lines.isfinite().all(1)
        else:
            dense = values.to(DTYPES[self.format])
            wrong |= ~dense.isfinite().all(1)
            packed = dense.view(torch.uint8).numpy()
        if wrong.any():
            wanted = "probabilities that add up to one" if probs else f"finite numbers that {self.format} can hold"
            raise ValueError(f"labels: row {int(wrong.nonzero()[0])}: expected {wanted}")
        return packed

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


def _check_classifier(given: tuple[Tensor, Tensor | None] | None, format: str, num_classes: int) -> tuple[Tensor, ...]:
    """Weight and bias in float32; nothing for the other formats."""
    if (format == "features8") != (given is not None):
        wanted = "the weight and bias of the last layer" if format == "features8" else "None"
        raise ValueError(f"classifier: expected {wanted} for {format!r}, got {given!r:.60}")
    if given is None:
        return ()
    weight, bias = given
    if weight.dim() != 2 or len(weight) != num_classes or not weight.shape[1]:
        raise ValueError(f"classifier: expected a weight of [{num_classes}, D], got {list(weight.shape)}")
    bias = weight.new_zeros(num_classes) if bias is None else bias
    if bias.shape != (num_classes,):
        raise ValueError(f"classifier: expected a bias of [{num_classes}], got {list(bias.shape)}")
    layer = tuple(each.detach().to("cpu", torch.float32).contiguous() for each in (weight, bias))
    if not all(bool(each.isfinite().all()) for each in layer):
        raise ValueError("classifier: expected finite numbers, got others")
    return layer


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
    """The blocks of an epoch with their shards, in canonical order; ValueError for duplicate or missing labels."""
    held = [(shard, block) for shard in shards for block in shard._blocks_of(epoch)]
    ids = [shard._ids_of(epoch, block) for shard, block in held]
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
        check_whole(name, value, least)
