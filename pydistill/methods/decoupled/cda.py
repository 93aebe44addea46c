"""CDA (Yin and Shen, 2023): SRe2L's recovery with crops that begin with the whole image and grow smaller.

The least share s of the area that a crop shows falls from 1 to ``crop`` over the first ``milestone`` of the iterations,
in one step, linearly or by a cosine, s(i) = crop + (1 - crop) (1 + cos(pi i / (milestone N))) / 2, and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydistill.augment import crop_schedule
from pydistill.methods.decoupled.recover import Recover

__all__ = ["CDA"]


@dataclass(frozen=True)
class CDA(Recover):
    """CDA's hyper-parameters."""

    name: ClassVar[str] = "cda"
    about: ClassVar[str] = "SRe2L with crops that begin with the whole image"
    paper: ClassVar[str] = "Yin and Shen, 2023"
    shares: ClassVar[tuple[str, ...]] = ("crop", "milestone")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"iterations": 200, "jitter": 2, "crop": 0.5, "flip": 0.0},
        "fashion-mnist": {"iterations": 300, "jitter": 2, "crop": 0.25},
        "cifar10": {},
        "cifar100": {},
        "tiny-imagenet": {"iterations": 4000, "lr": 0.4, "r_bn": 0.05},
        "imagenet-1k": {"iterations": 4000, "jitter": 32},
    }

    crop: float = 0.08
    """The least share of the area that a crop finally shows, one crop for the whole batch."""
    flip: float = 0.5
    """Probability of mirroring a batch."""
    schedule: Literal["step", "linear", "cosine"] = "cosine"
    """How the least share of the area that a crop shows falls from 1 to crop."""
    milestone: float = 1.0
    """The share of the iterations in which the least share of a crop falls."""

    def lowest_crop(self, iteration: int) -> float:
        return crop_schedule(self.schedule, iteration, self.iterations, self.milestone, self.crop)
