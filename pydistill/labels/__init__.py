"""Soft labels: stored with what replays their augmentation, and trained on in their stored form."""

from pydistill.labels.dataset import SoftLabelDataset, StoredBatches, collate_soft_labels
from pydistill.labels.fkd import import_fkd
from pydistill.labels.records import CROP_BYTES
from pydistill.labels.soft_labels import SoftLabels
from pydistill.labels.store import SoftLabelStore
from pydistill.ops.sparse_label_loss import sparse_label_loss

__all__ = [
    "CROP_BYTES",
    "SoftLabelDataset",
    "SoftLabelStore",
    "SoftLabels",
    "StoredBatches",
    "collate_soft_labels",
    "import_fkd",
    "sparse_label_loss",
]
