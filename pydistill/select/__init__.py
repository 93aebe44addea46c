"""Choosing real images, and parts of them, to train on or to start from."""

from pydistill.select.class_herding import herding
from pydistill.select.clustering import kmeans, representatives
from pydistill.select.dynamics import TrainingDynamics
from pydistill.select.facility_location import facility_location_greedy
from pydistill.select.graph_cut import graph_cut_greedy
from pydistill.select.patches import best_crops, drop_patches, mosaic, patch_importance
from pydistill.select.scores import sample_scores

__all__ = [
    "TrainingDynamics",
    "best_crops",
    "drop_patches",
    "facility_location_greedy",
    "graph_cut_greedy",
    "herding",
    "kmeans",
    "mosaic",
    "patch_importance",
    "representatives",
    "sample_scores",
]
