"""Soft labels of distilled images: projectors that make them while a student trains."""

from pydistill.labels.lora import LoRAConv, LoRALinear, add_lora, lora_logits
from pydistill.labels.projector import Projector, feature_distance, open_clip_encoder

__all__ = [
    "LoRAConv",
    "LoRALinear",
    "Projector",
    "add_lora",
    "feature_distance",
    "lora_logits",
    "open_clip_encoder",
]
