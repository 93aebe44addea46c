"""Augmentations that draw their parameters first and are differentiable in the images."""

from typing import TYPE_CHECKING

from pydistill._renamed import moved
from pydistill.augment.crops import MultiCrop, crop_schedule
from pydistill.augment.normalize import clamp_normalized_
from pydistill.augment.record import mix_labels, mix_weights, record_from_bytes, record_to_bytes
from pydistill.augment.siamese import DiffAugment, diff_augment

__all__ = [
    "DiffAugment",
    "MultiCrop",
    "clamp_normalized_",
    "crop_schedule",
    "diff_augment",
    "mix_labels",
    "mix_weights",
    "record_from_bytes",
    "record_to_bytes",
]

if not TYPE_CHECKING:
    __getattr__ = moved(__name__, {"multi_crop": "pydistill.ops"})
