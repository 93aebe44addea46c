"""Training students, plainly or differentiably, and what else trajectory matching needs."""

from pydistill.ops._convnet_step_graph import release_graphs
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.inner_loop import NonFiniteError
from pydistill.trajectory.match import trajectory_match
from pydistill.trajectory.memory import KeptSteps
from pydistill.trajectory.optimizers import Adam
from pydistill.trajectory.recognition import convnet_shape
from pydistill.trajectory.smooth import GSAM, Smoothing
from pydistill.trajectory.store import ExpertStore
from pydistill.trajectory.train import DivergedError, TrainResult, train_students
from pydistill.trajectory.trajectories import Trajectories, as_trajectories
from pydistill.trajectory.unrolling import unroll

__all__ = [
    "GSAM",
    "Adam",
    "DivergedError",
    "ExpertStore",
    "FlatModule",
    "KeptSteps",
    "NonFiniteError",
    "Smoothing",
    "TrainResult",
    "Trajectories",
    "as_trajectories",
    "convnet_shape",
    "release_graphs",
    "train_students",
    "trajectory_match",
    "unroll",
]
