"""Choosing real images to start from."""

from pydistill.select.kmeans import kmeans, representatives

__all__ = ["kmeans", "representatives"]
