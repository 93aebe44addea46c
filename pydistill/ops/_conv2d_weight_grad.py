"""The operator that gives a convolution's gradient in its filters, by Winograd's F(4x4, 3x3) or F(2x2, 5x5).

For graphs in which every derivative is written down: it has none itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pydistill.ops._operator import Operator


def _fake(x: Tensor, grad: Tensor, x_2: Tensor | None, grad_2: Tensor | None, taps: int) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], taps, taps))


def _vmap(*_: Any) -> Any:
    raise NotImplementedError("conv2d_weight_grad: vmap is not supported")


# (x [N, C, H, W], grad [N, K, H, W], x_2, grad_2, taps) -> [K, C, taps, taps]: the gradient in w of
# <grad, F.conv2d(x, w, padding=taps // 2)> + <grad_2, F.conv2d(x_2, w, padding=taps // 2)>, the second pair or None;
# float32 or float64, taps of 3 or 5, channels-last read as it is. Equal bits over thread counts.
conv2d_weight_grad = Operator("conv2d_weight_grad", tensors=4, fake=_fake, vmap=_vmap, vjp=None, jvp=None)
