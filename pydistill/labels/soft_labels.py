"""A batch out of a label store, in the bytes that it is stored in, and the loss against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydistill import _host
from pydistill.labels._reader import RowLayout
from pydistill.labels.records import unpack
from pydistill.ops._rows import check_floating
from pydistill.ops.kd_divergence import kd_divergence
from pydistill.ops.sparse_label_loss import of_checked

__all__ = ["SoftLabels"]

_SMALL = 1 << 18  # bytes


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """Labels of B images at an epoch, decoded when they are asked for.

    A label of the formats "topk" and "topk8" is a distribution: k classes, their probabilities, and the mass of the
    other C - k classes, spread evenly over them (Dataset Reinforcement's "smooth", Faghri et al., ICCV 2023). The
    probabilities are stored relative to the largest, and add up to one minus the mass, which is stored in float32. A
    label of the dense formats is a row of logits, or of probabilities, as it was written.

    Attributes:
        images: int64 ``[B]``.
        rows: uint8 ``[B, row_bytes]``, on the CPU: label, then record.
        layout: what these bytes mean.
        epoch: which the labels are of.
        device: where decoded labels go.
    """

    images: Tensor
    rows: Tensor
    layout: RowLayout
    epoch: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes a small batch goes as its bytes: a tensor takes a shared-memory file of its own."""
        if self.rows.numel() > _SMALL:
            return SoftLabels, (self.images, self.rows, self.layout, self.epoch, self.device)
        arrays = self.images.cpu().numpy(), self.rows.cpu().numpy()
        return _from_bytes, (*(array.tobytes() for array in arrays), self.layout, self.epoch, self.device)

    @property
    def records(self) -> Tensor:
        """What replays the images' augmentation, uint8 ``[B, record_bytes]``, on the CPU, a view."""
        first = self.layout.label_bytes
        return self.rows[:, first : first + self.layout.record_bytes]

    def crops(self) -> Tensor:
        """Records that `write` got from `pydistill.augment.MultiCrop`: float32 ``[B, P, 14]``, as `multi_crop` takes.

        Raises:
            ValueError: the records are of another length than those.
        """
        return unpack(self.records).to(self.device)

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
        """The logits or probabilities of the dense formats, float16 or bfloat16 ``[B, C]``; a view on the CPU."""
        if self.layout.k:
            raise ValueError(
                f"dense: expected labels in fp16 or bf16, got {self.layout.format}; densify() makes them so"
            )
        dtype = torch.float16 if self.layout.format == "fp16" else torch.bfloat16
        return self.rows[:, : self.layout.label_bytes].view(dtype).to(self.device)

    @cached_property
    def _topk(self) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        if not layout.k:
            raise ValueError(f"indices, values, tail: expected top-k labels, got {layout.format}, which has dense")
        found = _host.decode_topk(self.rows.numpy(), layout.num_classes, layout.k, layout.step)
        indices, values, tail = (torch.from_numpy(each).to(self.device) for each in found)
        return indices, values, tail

    def densify(self, T: float | None = None) -> Tensor:
        """The distributions at temperature T, float32 ``[B, C]``; `loss` gets by without them.

        Args:
            T: as of `loss`.
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
        """KL divergence of a student's softmax at temperature T from the labels, taken from the stored form.

        Equivalent to ``F.kl_div((logits / T).log_softmax(1), labels.densify(T), reduction="batchmean")``, the loss of
        FKD (Shen and Xing, ECCV 2022) and SRe2L (Yin et al., NeurIPS 2023), which leave out the factor T^2; top-k
        labels are not densified.

        Args:
            logits: floating ``[B, C]``, the student's for the images as the records make them.
            T: by default, and for all but dense logits necessarily, the temperature that the store was made with.
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
            if reduction not in ("batchmean", "sum", "none"):
                raise ValueError(f"reduction: expected 'batchmean', 'sum' or 'none', got {reduction!r}")
            check_floating("logits", logits)
            return of_checked(logits, self.indices, self.values, T, scale_T2=scale_T2, reduction=reduction)
        return kd_divergence(
            logits,
            self.dense.to(logits.dtype),
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
        """What a ``DataLoader`` calls where it pins; the few bytes are left as they are."""
        return self

    def __getitem__(self, rows: slice | Tensor) -> SoftLabels:
        return replace(self, images=self.images[rows], rows=self.rows[rows])

    def _temperature(self, T: float | None) -> float:
        made = self.layout.temperature
        if T is None or made == T:
            return made
        if self.layout.k or self.layout.target == "probs":
            raise ValueError(f"T: expected {made:g}, at which these labels' probabilities were taken, got {T:g}")
        return T


def _from_bytes(images: bytes, rows: bytes, layout: RowLayout, epoch: int, device: torch.device) -> SoftLabels:
    ids = np.frombuffer(bytearray(images), np.int64)
    found = np.frombuffer(bytearray(rows), np.uint8).reshape(len(ids), layout.row_bytes)
    return SoftLabels(torch.from_numpy(ids), torch.from_numpy(found), layout, epoch, device)
