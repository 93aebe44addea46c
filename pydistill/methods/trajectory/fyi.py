"""FYI: flip your images.

Son, Oh, Baek, Ham, "FYI: Flip Your Images for Dataset Distillation", ECCV 2024. Each batch of synthetic images is seen
together with its mirror image, so that no image need encode both. For trajectory matching (the authors' code
differentiates as TESLA does: ``mode="first_order"``), DM and DSA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydistill.augment import DiffAugment
from pydistill.methods.matching.dm import DM
from pydistill.methods.matching.dsa import DSA
from pydistill.methods.trajectory.matching import Matching
from pydistill.methods.trajectory.mtt import MTT


def _halved(row: dict[str, Any]) -> dict[str, Any]:
    """Halves the batch size, since mirror images double the batch."""
    return row | ({"batch_syn": row["batch_syn"] // 2} if "batch_syn" in row else {})


class _Flipped:
    augment: str

    def augmentation(self) -> DiffAugment:
        return DiffAugment(self.augment, flip_batch=True)


@dataclass(frozen=True)
class FYI(_Flipped, Matching):
    """MTT's hyper-parameters."""

    name: ClassVar[str] = "fyi"
    about: ClassVar[str] = "MTT whose images are seen with their mirror images"
    paper: ClassVar[str] = "Son et al., ECCV 2024"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        data: {ipc: _halved(row) for ipc, row in rows.items()} for data, rows in MTT.presets.items()
    }


@dataclass(frozen=True)
class FYIDM(_Flipped, DM):
    """DM's hyper-parameters."""

    name: ClassVar[str] = "fyi_dm"
    about: ClassVar[str] = "DM whose images are seen with their mirror images"
    paper: ClassVar[str] = "Son et al., ECCV 2024"


@dataclass(frozen=True)
class FYIDSA(_Flipped, DSA):
    """DSA's hyper-parameters."""

    name: ClassVar[str] = "fyi_dsa"
    about: ClassVar[str] = "DSA whose images are seen with their mirror images"
    paper: ClassVar[str] = "Son et al., ECCV 2024"
