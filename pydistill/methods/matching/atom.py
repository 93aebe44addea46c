"""ATOM: attention over positions and over channels.

Khaki, Sajedi, Wang, Liu, Lawryshyn, Plataniotis, "ATOM: Attention Mixer for Efficient Dataset Distillation", CVPR
Workshops 2024. DataDAM, with attention over channels matched as well as over positions. The authors' code is not
public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydistill.methods.matching.datadam import DataDAM


@dataclass(frozen=True)
class ATOM(DataDAM):
    """DataDAM's hyper-parameters."""

    name: ClassVar[str] = "atom"
    about: ClassVar[str] = "match mean features, spatial attention and channel attention"
    paper: ClassVar[str] = "Khaki et al., CVPR Workshops 2024"
    axis: ClassVar[Literal["spatial", "both"]] = "both"
