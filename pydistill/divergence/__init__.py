"""Divergences between networks' output distributions, and the choice of a layer whose attention to distil."""

from pydistill.divergence.contrastive import contrastive_ce
from pydistill.divergence.nmi import attention_nmi
from pydistill.ops.attention_map_divergence import attention_map_divergence
from pydistill.ops.kd_divergence import kd_divergence

__all__ = ["attention_map_divergence", "attention_nmi", "contrastive_ce", "kd_divergence"]
