"""Augmentations that draw their parameters first and are differentiable in the images."""

from pydistill.augment.crops import MultiCrop, crop_schedule
from pydistill.augment.normalize import clamp_normalized_
from pydistill.augment.record import mix_labels, mix_weights, record_from_bytes, record_to_bytes
from pydistill.augment.siamese import DiffAugment, diff_augment
from pydistill.ops.multi_crop import multi_crop

__all__ = [
    "DiffAugment",
    "MultiCrop",
    "clamp_normalized_",
    "crop_schedule",
    "diff_augment",
    "mix_labels",
    "mix_weights",
    "multi_crop",
    "record_from_bytes",
    "record_to_bytes",
]
