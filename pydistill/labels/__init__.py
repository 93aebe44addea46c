"""Soft labels of distilled images: their stored forms, and losses on them."""

from pydistill.ops.sparse_label_loss import sparse_label_loss

__all__ = ["sparse_label_loss"]
