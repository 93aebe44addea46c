"""A batch from a label store, in its stored bytes, and the loss against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydistill import _host
from pydistill._arguments import check_choice
from pydistill._devices import to_device
from pydistill.labels import linear8
from pydistill.labels._reader import RowLayout
from pydistill.labels.records import unpack
from pydistill.ops._rows import check_floating
from pydistill.ops.kd_divergence import kd_divergence
from pydistill.ops.sparse_label_loss import of_checked

__all__ = ["SoftLabels"]

_SMALL = 1 << 18  # bytes
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """Labels of B images at an epoch, decoded on demand.

    A label of the formats "topk" and "topk8" is a distribution: k classes, their probabilities, and the mass of the
    other C - k classes, spread evenly over them (Dataset Reinforcement's "smooth", Faghri et al., ICCV 2023). The
    probabilities are stored relative to the largest, and add up to one minus the mass, which is stored in float32. A
    label of the other formats is a row of logits, or of probabilities, exactly or nearly as written.

    Attributes:
        images: int64 ``[B]``.
        rows: uint8 ``[B, row_bytes]``, on the CPU: label, then record.
        layout: what these bytes mean.
        epoch: of the labels.
        device: where decoded labels go.
        classifier: weight ``[C, D]`` and bias ``[C]``, float32, for "features8".
        places: for labels that came through a `SoftLabelDataset`, int64 ``[B]``: their block and row, as given by
            `LabelReader.places`.
        store: for these, the file that they are from.
    """

    images: Tensor
    rows: Tensor
    layout: RowLayout
    epoch: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    classifier: tuple[Tensor, Tensor] | None = None
    places: Tensor | None = None
    store: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes a small batch goes as its bytes: a tensor would take its own shared-memory file."""
        rest = self.layout, self.epoch, self.device, self.classifier
        if self.rows.numel() > _SMALL:
            return SoftLabels, (self.images, self.rows, *rest, self.places, self.store)
        arrays = [None if each is None else each.numpy().tobytes() for each in (self.images, self.rows, self.places)]
        return _from_bytes, (*arrays, *rest, self.store)

    @property
    def records(self) -> Tensor:
        """The records of the images' augmentation, uint8 ``[B, record_bytes]``, on the CPU, a view."""
        first = self.layout.label_bytes
        return self.rows[:, first : first + self.layout.record_bytes]

    def crops(self) -> Tensor:
        """Records that `write` got from `pydistill.augment.MultiCrop`: float32 ``[B, P, 14]``, as `multi_crop` takes.

        Labels that came through a `SoftLabelDataset` name places in their own batch, in whatever order it was drawn.
        Those from `SoftLabelStore.read` name what was written: places in the written batch, or images of the set,
        according to the store's ``sources``.

        Raises:
            ValueError: the records are of another length; or an image was mixed with one that is not in the batch, as
                happens in a shuffled loader: use `StoredBatches`.
        """
        record = unpack(self.records)
        if self.places is not None and len(record):
            record[..., 0] = self._in_batch(record[..., 0].long()).float()
        return to_device(record, self.device)

    def _in_batch(self, sources: Tensor) -> Tensor:
        """Where in this batch the sources ``[B, P]`` of its records are."""
        assert self.places is not None
        size = self.layout.batch_size
        if self.layout.sources == "images":
            have = self.images
        else:
            have, sources = self.places, self.places[:, None] // size * size + sources
        ascending, order = have.sort()
        found = torch.searchsorted(ascending, sources).clamp(max=len(have) - 1)
        missing = (ascending[found] != sources).any(1)
        if missing.any():
            raise ValueError(
                f"records: image {int(self.images[missing][0])} was mixed with an image of the batch that it was "
                f"labelled in, which is not in this one of {len(self)}: labels of mixed images are read in the batches "
                "that were written, DataLoader(data, batch_sampler=StoredBatches(data), ...), and not shuffled"
            )
        return order[found]

    @property
    def indices(self) -> Tensor:
        """The k classes of a top-k label, int64 ``[B, k]``, the most probable first."""
        return self._topk[0]

    @property
    def values(self) -> Tensor:
        """Their probabilities, float32 ``[B, k]``."""
        return self._topk[1]

    @property
    def tail(self) -> Tensor:
        """The mass of all other classes, float32 ``[B]``."""
        return self._topk[2]

    @property
    def dense(self) -> Tensor:
        """The logits or probabilities of all but the top-k formats, ``[B, C]``.

        In the dtype of "fp32", "fp16" and "bf16", a view on the CPU; in float32 for "logits8" and "features8".
        """
        layout = self.layout
        if layout.k:
            raise ValueError(f"dense: expected labels of all classes, got {layout.format}; densify() makes them so")
        if not layout.group:
            return to_device(self.rows[:, : layout.label_bytes].view(DTYPES[layout.format]), self.device)
        numbers = linear8.unpack(self.rows, layout.codes, layout.group, self.device)
        if self.classifier is None:
            return numbers
        weight, bias = (to_device(each, self.device) for each in self.classifier)
        return torch.addmm(bias, numbers, weight.T)

    @property
    def features(self) -> Tensor:
        """The teacher's penultimate features as kept by "features8", float32 ``[B, D]``."""
        if not self.layout.features:
            raise ValueError(f"features: expected labels in features8, got {self.layout.format}")
        return linear8.unpack(self.rows, self.layout.codes, self.layout.group, self.device)

    @cached_property
    def _topk(self) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        if not layout.k:
            raise ValueError(f"indices, values, tail: expected top-k labels, got {layout.format}, which has dense")
        found = _host.decode_topk(self.rows.numpy(), layout.num_classes, layout.k, layout.step)
        indices, values, tail = (to_device(torch.from_numpy(each), self.device) for each in found)
        return indices, values, tail

    def densify(self, T: float | None = None) -> Tensor:
        """The distributions at temperature T, float32 ``[B, C]``; `loss` does without them.

        Args:
            T: as for `loss`.
        """
        T = self._temperature(T)
        if not self.layout.k:
            dense = self.dense.float()
            return (dense / T).softmax(1) if self.layout.target == "logits" else dense
        others = self.layout.num_classes - self.layout.k
        each = self.tail / others if others else torch.zeros_like(self.tail)
        return each[:, None].repeat(1, self.layout.num_classes).scatter(1, self.indices, self.values)

    def loss(
        self,
        logits: Tensor,
        *,
        T: float | None = None,
        scale_T2: bool = False,
        reduction: Literal["batchmean", "sum", "none"] = "batchmean",
    ) -> Tensor:
        """KL divergence of a student's softmax at temperature T from the labels, computed from the stored form.

        Equivalent to ``F.kl_div((logits / T).log_softmax(1), labels.densify(T), reduction="batchmean")``, the loss of
        FKD (Shen and Xing, ECCV 2022) and SRe2L (Yin et al., NeurIPS 2023), which leave out the factor T^2; top-k
        labels are not densified.

        Args:
            logits: floating ``[B, C]``, the student's for the images as augmented by the records.
            T: the store's temperature by default, and necessarily for all formats without logits.
            scale_T2: whether to multiply by T^2.
            reduction: "batchmean" (the mean over rows), "sum" or "none".

        Raises:
            ValueError: the logits are not ``[B, C]`` of these labels, or T is not theirs.
        """
        T = self._temperature(T)
        if logits.shape != (len(self), self.layout.num_classes):
            raise ValueError(
                f"logits: expected [{len(self)}, {self.layout.num_classes}] as the labels, got {list(logits.shape)}"
            )
        if self.layout.k:
            check_choice("reduction", reduction, ("batchmean", "sum", "none"))
            check_floating("logits", logits)
            return of_checked(logits, self.indices, self.values, T, scale_T2=scale_T2, reduction=reduction)
        return kd_divergence(
            logits,
            self.dense,
            kind="fkl",
            T=T,
            target_is=self.layout.target,
            scale_T2=scale_T2,
            reduction=reduction,
        )

    def to(self, device: torch.device | str) -> SoftLabels:
        """The same labels, decoded on ``device``; their bytes stay on the CPU."""
        return replace(self, device=torch.device(device))

    def pin_memory(self) -> SoftLabels:
        """Called by a ``DataLoader`` that pins memory: the bytes, which are what is copied or decoded from."""
        places = None if self.places is None else self.places.pin_memory()
        return replace(self, images=self.images.pin_memory(), rows=self.rows.pin_memory(), places=places)

    def __getitem__(self, rows: slice | Tensor) -> SoftLabels:
        places = None if self.places is None else self.places[rows]
        return replace(self, images=self.images[rows], rows=self.rows[rows], places=places)

    def _temperature(self, T: float | None) -> float:
        made = self.layout.temperature
        if T is None or made == T:
            return made
        if self.layout.k or self.layout.target == "probs":
            raise ValueError(f"T: expected {made:g}, at which these labels' probabilities were taken, got {T:g}")
        return T


def _from_bytes(
    images: bytes,
    rows: bytes,
    places: bytes | None,
    layout: RowLayout,
    epoch: int,
    device: torch.device,
    classifier: tuple[Tensor, Tensor] | None,
    store: str,
) -> SoftLabels:
    ids = torch.from_numpy(np.frombuffer(bytearray(images), np.int64))
    found = torch.from_numpy(np.frombuffer(bytearray(rows), np.uint8).reshape(len(ids), layout.row_bytes))
    here = None if places is None else torch.from_numpy(np.frombuffer(bytearray(places), np.int64))
    return SoftLabels(ids, found, layout, epoch, device, classifier, here, store)
