"""Operators for graphs of convolutions besides `frozen_conv2d`'s, by Winograd's F(4x4, 3x3) and F(2x2, 5x5).

For graphs in which every derivative is explicit: the operators themselves have none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pydistill.ops._operator import Operator


def _filters_fake(weight: Tensor, turned: bool) -> Tensor:
    K, C = weight.shape[:2] if not turned else weight.shape[1::-1]
    lanes = 64 // weight.dtype.itemsize
    return weight.new_empty((36, -(-K // lanes), C, lanes))


def _weight_grad_fake(x: Tensor, grad: Tensor, x_2: Tensor | None, grad_2: Tensor | None, taps: int) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], taps, taps))


def _vmap(*_: Any) -> Any:
    raise NotImplementedError("convolutions in a graph: vmap is not supported")


# (weight [K, C, taps, taps], turned) -> its `FrozenFilters.forward`, or `FrozenFilters.adjoint` if turned;
# float32 or float64, taps of 3 or 5, any strides.
conv2d_filters: Operator = Operator("conv2d_filters", tensors=1, fake=_filters_fake, vmap=_vmap, vjp=None, jvp=None)

# (x [N, C, H, W], grad [N, K, H, W], x_2, grad_2, taps) -> [K, C, taps, taps]: the gradient in w of
# <grad, F.conv2d(x, w, padding=taps // 2)> + <grad_2, F.conv2d(x_2, w, padding=taps // 2)>, the second pair or None;
# float32 or float64, taps of 3 or 5, channels-last read as it is. Equal bits over thread counts.
conv2d_weight_grad = Operator("conv2d_weight_grad", tensors=4, fake=_weight_grad_fake, vmap=_vmap, vjp=None, jvp=None)
