"""Accelerated kernels and exact constant-memory trajectory gradients for dataset distillation on PyTorch."""

from importlib.metadata import version as _version

from pydistill import compat, nn, ops, reference
from pydistill.ops import instance_norm_relu_avg_pool
from pydistill.trajectory import trajectory_match, unroll

__version__ = _version("pydistill")
__all__ = [
    "__version__",
    "compat",
    "instance_norm_relu_avg_pool",
    "nn",
    "ops",
    "reference",
    "trajectory_match",
    "unroll",
]
