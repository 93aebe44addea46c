"""Plain-torch definitions of the operators: any device and dtype, differentiable to any order."""

from pydistill.reference.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool
from pydistill.reference.soft_cross_entropy import soft_cross_entropy

__all__ = ["instance_norm_relu_avg_pool", "soft_cross_entropy"]
