"""Student networks as the method repositories define them, on the fused operators."""

from pydistill.nn.accelerate import Conv2d, InstanceNormReLUAvgPool, accelerate
from pydistill.nn.convnet import ConvNet

__all__ = ["Conv2d", "ConvNet", "InstanceNormReLUAvgPool", "accelerate"]
