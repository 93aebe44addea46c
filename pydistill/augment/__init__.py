"""Augmentations that draw their parameters first and are differentiable in the images."""

from pydistill.augment.siamese import DiffAugment, diff_augment

__all__ = ["DiffAugment", "diff_augment"]
