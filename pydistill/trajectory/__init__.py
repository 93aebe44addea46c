"""Differentiable unrolls of student training, and what trajectory matching needs around them."""

from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.match import trajectory_match
from pydistill.trajectory.students import convnet_shape
from pydistill.trajectory.unroll import unroll

__all__ = ["FlatModule", "convnet_shape", "trajectory_match", "unroll"]
