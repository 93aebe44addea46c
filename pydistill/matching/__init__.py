"""Losses that match a network's attention, features or gradients on real and synthetic images."""

from pydistill.matching.attention import attention_match, match_maps
from pydistill.matching.class_mean import check_classes, class_mean_match, class_means
from pydistill.matching.discrepancy import mmd
from pydistill.matching.feature_maps import Features, features
from pydistill.matching.gradient import gradient_match
from pydistill.matching.krr import KRRInfo, krr_loss
from pydistill.matching.per_class import class_gradients

__all__ = [
    "Features",
    "KRRInfo",
    "attention_match",
    "check_classes",
    "class_gradients",
    "class_mean_match",
    "class_means",
    "features",
    "gradient_match",
    "krr_loss",
    "match_maps",
    "mmd",
]
