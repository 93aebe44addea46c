"""DSA: gradient matching under differentiable siamese augmentation.

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021. DC in which the real and
synthetic images of a class go through one augmentation, redrawn each time, and networks train on augmented images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydistill.methods.config import PHOTOGRAPHS
from pydistill.methods.matching.dc import DC

_DIGITS = {"augment": "color_crop_cutout_scale_rotate"}  # a mirrored digit is not a digit


@dataclass(frozen=True)
class DSA(DC):
    """DC's hyper-parameters; its images start as real ones."""

    name: ClassVar[str] = "dsa"
    about: ClassVar[str] = "match gradients of augmented images"
    paper: ClassVar[str] = "Zhao and Bilen, ICML 2021"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = DC.presets | {
        "digits": {ipc: row | _DIGITS for ipc, row in DC.presets["digits"].items()},
    }

    augment: str = field(default=PHOTOGRAPHS, kw_only=True)
    """Differentiable siamese augmentation of a class's real and synthetic images alike: operations joined by _."""
    start: Literal["noise", "real"] = "real"
    """What the synthetic images are at first: noise, or real images."""
