"""Accelerated kernels and exact constant-memory trajectory gradients for dataset distillation on PyTorch."""

from importlib.metadata import version as _version

from pydistill.ops import instance_norm_relu_avg_pool

__version__ = _version("pydistill")
__all__ = ["__version__", "instance_norm_relu_avg_pool"]
