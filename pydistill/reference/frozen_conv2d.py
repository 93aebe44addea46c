"""The definition of the convolutions with frozen filters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frozen_conv2d(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight.detach().to(x.dtype), stride=stride, padding=weight.shape[2] // 2)
