"""Definition of the ConvNet block after its convolution."""

import torch.nn.functional as F
from torch import Tensor


def instance_norm_relu_avg_pool(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = True, pool: bool = True
) -> Tensor:
    """``avg_pool2d(relu(group_norm(x, C, weight, bias, eps)), 2)``: [N, C, H, W] -> [N, C, H // 2, W // 2]."""
    y = F.group_norm(x, x.shape[1], weight.to(x.dtype), bias.to(x.dtype), eps)  # one group per channel
    if relu:
        y = F.relu(y)
    return F.avg_pool2d(y, 2) if pool else y
