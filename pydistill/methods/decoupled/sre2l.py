"""SRe2L (Yin, Xing, Shen, NeurIPS 2023): images recovered from noise by a classifier and its BatchNorm statistics.

The published code crops, mirrors and rolls the whole batch alike, 100 images of 100 classes; so does this. On
ImageNet it crops; on CIFAR it only rolls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydistill.methods.decoupled.recover import Recover

__all__ = ["SRe2L"]


@dataclass(frozen=True)
class SRe2L(Recover):
    """SRe2L's hyper-parameters."""

    name: ClassVar[str] = "sre2l"
    about: ClassVar[str] = "images recovered from noise"
    paper: ClassVar[str] = "Yin, Xing, Shen, NeurIPS 2023"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"iterations": 200, "jitter": 2},
        "fashion-mnist": {"iterations": 300, "jitter": 2, "flip": 0.5, "crop": 0.5},
        "cifar10": {},
        "cifar100": {},
        "tiny-imagenet": {"iterations": 4000, "lr": 0.1, "r_bn": 1.0, "crop": 0.08, "flip": 0.5},
        "imagenet-1k": {"iterations": 4000, "crop": 0.08, "flip": 0.5, "jitter": 32},
    }
