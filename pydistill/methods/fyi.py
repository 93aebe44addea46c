"""FYI: flip your images.

Son, Oh, Baek, Ham, "FYI: Flip Your Images for Dataset Distillation", ECCV 2024. Each batch of synthetic images is seen
together with its mirror image, so that the images need not spend themselves on both. On trajectory matching (the
authors' code differentiates as TESLA does: ``mode="first_order"``), on DM and on DSA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydistill.augment import DiffAugment
from pydistill.methods.dm import DM
from pydistill.methods.dsa import DSA
from pydistill.methods.matching import Matching
from pydistill.methods.mtt import MTT


def _halved(row: dict[str, Any]) -> dict[str, Any]:
    """A batch is twice as large with its mirror images in it."""
    return row | ({"batch_syn": row["batch_syn"] // 2} if "batch_syn" in row else {})


class _Flipped:
    augment: str

    def augmentation(self) -> DiffAugment:
        return DiffAugment(self.augment, flip_batch=True)


@dataclass(frozen=True)
class FYI(_Flipped, Matching):
    """MTT's hyper-parameters."""

    name: ClassVar[str] = "fyi"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        data: {ipc: _halved(row) for ipc, row in rows.items()} for data, rows in MTT.presets.items()
    }


@dataclass(frozen=True)
class FYIDM(_Flipped, DM):
    """DM's hyper-parameters."""

    name: ClassVar[str] = "fyi_dm"


@dataclass(frozen=True)
class FYIDSA(_Flipped, DSA):
    """DSA's hyper-parameters."""

    name: ClassVar[str] = "fyi_dsa"
