"""Divergences between networks' output distributions, and the choice of a layer whose attention to distil."""

from typing import TYPE_CHECKING

from pydistill._renamed import moved
from pydistill.divergence.contrastive import contrastive_ce
from pydistill.divergence.nmi import attention_nmi

__all__ = ["attention_nmi", "contrastive_ce"]

if not TYPE_CHECKING:
    __getattr__ = moved(__name__, dict.fromkeys(("attention_map_divergence", "kd_divergence"), "pydistill.ops"))
