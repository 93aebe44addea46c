"""What makes two sets of images alike: losses between features of real and of synthetic ones."""

from pydistill.matching.class_mean import check_classes, class_mean_match, class_means
from pydistill.matching.mmd import mmd

__all__ = ["check_classes", "class_mean_match", "class_means", "mmd"]
