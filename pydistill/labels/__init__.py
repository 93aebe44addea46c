"""Soft labels: stored with their augmentation's records and trained on as stored, or made by a label projector."""

from typing import TYPE_CHECKING

from pydistill._renamed import moved
from pydistill.labels.dataset import SoftLabelDataset, StoredBatches, collate_soft_labels
from pydistill.labels.fkd import import_fkd
from pydistill.labels.gradient_error import GradientError
from pydistill.labels.lora import LoRAConv, LoRALinear, add_lora, lora_logits
from pydistill.labels.projector import Projector, feature_distance, open_clip_encoder
from pydistill.labels.records import CROP_BYTES
from pydistill.labels.soft_labels import SoftLabels
from pydistill.labels.store import SoftLabelStore

__all__ = [
    "CROP_BYTES",
    "GradientError",
    "LoRAConv",
    "LoRALinear",
    "Projector",
    "SoftLabelDataset",
    "SoftLabelStore",
    "SoftLabels",
    "StoredBatches",
    "add_lora",
    "collate_soft_labels",
    "feature_distance",
    "import_fkd",
    "lora_logits",
    "open_clip_encoder",
]

if not TYPE_CHECKING:
    __getattr__ = moved(__name__, {"sparse_label_loss": "pydistill.ops"})
