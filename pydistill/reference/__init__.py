"""Plain-torch definitions of the operators: any device and dtype, differentiable to any order."""

from pydistill.reference.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool

__all__ = ["instance_norm_relu_avg_pool"]
