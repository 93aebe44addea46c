"""Differentiable unrolls of student training, and what trajectory matching needs around them."""

from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.match import trajectory_match
from pydistill.trajectory.unroll import unroll

__all__ = ["FlatModule", "trajectory_match", "unroll"]
