"""The operators: one file each, registered with torch when imported."""

from pydistill.ops.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool

__all__ = ["instance_norm_relu_avg_pool"]
