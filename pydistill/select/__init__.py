"""Choosing real images to start from."""

from pydistill.select.kmeans import kmeans, representatives
from pydistill.select.scores import sample_scores

__all__ = ["kmeans", "representatives", "sample_scores"]
