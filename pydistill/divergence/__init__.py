"""Attention distillation: the divergence between attention maps, and which layer's map to distil."""

from pydistill.divergence.nmi import attention_nmi
from pydistill.ops.attention_map_divergence import attention_map_divergence

__all__ = ["attention_map_divergence", "attention_nmi"]
