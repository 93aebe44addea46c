"""2-d convolution whose second derivative is made of ordinary convolutions.

torch's own double backward of a convolution transposes batch and channels and needs kernels as large as the image, for
which no library is fast. Differentiating S = <u, grad_x> + <v, grad_w> + <s, grad_b> by hand gives

    dS/dgrad_y = conv(u, w) + conv(x, v) + s,    dS/dw = weight gradient of (u, grad_y),    dS/dx = input gradient of
    (grad_y, v):

forward and backward convolutions of the usual shapes, which torch's libraries (oneDNN, cuDNN) run. No kernel here is
our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("reference",)  # torch's own convolutions on every device

Pair = Sequence[int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Equivalent to ``F.conv2d(x, weight, bias, stride, padding, dilation, groups)``, with a faster second derivative.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``, dtype of x.
        bias: ``[K]`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``; padding as numbers, not as a string.

    Returns:
        ``[N, K, H', W']``. Differentiable to any order; errors are those of ``F.conv2d``.
    """
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    if torch.compiler.is_dynamo_compiling() or x.dim() != 4:
        return F.conv2d(x, weight, bias, *geometry)
    if torch.is_autocast_enabled(x.device.type):  # casts inside the Function would be hidden from its derivatives
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (t.to(dtype) if t.dtype == torch.float32 else t for t in (x, weight))
        bias = bias.to(dtype) if bias is not None and bias.dtype == torch.float32 else bias
    return _Conv2d.apply(x, weight, bias, geometry)


def _pair(value: int | Pair) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: tuple, mask: tuple[bool, ...]) -> list:
    """(input, weight, bias) gradients, None where ``mask`` is False."""
    stride, padding, dilation, groups = geometry
    out = torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, list(mask)
    )
    return [g if wanted else None for g, wanted in zip(out, mask, strict=True)]


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], start=present[0]) if present else None


class _Conv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        return *_Conv2dBackward.apply(grad_y, *ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3]), None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, _: None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        return _tangent(x, weight, x_t, weight_t, bias_t, ctx.geometry)


def _tangent(
    x: Tensor, weight: Tensor, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, geometry: tuple
) -> Tensor | None:
    """The convolution's derivative along (x_t, weight_t, bias_t), each of which may be absent."""
    # the bias goes into a convolution: added separately it costs another tensor of the output's size
    along_weight = None if weight_t is None else F.conv2d(x, weight_t, bias_t, *geometry)
    rest = bias_t if weight_t is None else None
    along_x = None if x_t is None else F.conv2d(x_t, weight, rest, *geometry)
    if along_weight is None and along_x is None:
        return None if bias_t is None else bias_t.view(-1, 1, 1)
    return _sum(along_weight, along_x)


class _Conv2dBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: tuple, mask: tuple[bool, ...]) -> tuple:
        return tuple(_gradients(grad_y, x, weight, geometry, mask))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_y, x, weight, ctx.geometry, ctx.mask = inputs
        ctx.save_for_backward(grad_y, x, weight)
        ctx.save_for_forward(grad_y, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> tuple:
        grad_y, x, weight = ctx.saved_tensors
        to_grad_y = to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad_y = _tangent(x, weight, u, v, s, ctx.geometry)
            if to_grad_y is not None:
                to_grad_y = to_grad_y.expand_as(grad_y)  # only the bias's share, where u and v are absent
        if ctx.needs_input_grad[1] and v is not None:
            to_x = _gradients(grad_y, x, v, ctx.geometry, (True, False, False))[0]
        if ctx.needs_input_grad[2] and u is not None:
            to_weight = _gradients(grad_y, u, weight, ctx.geometry, (False, True, False))[1]
        return to_grad_y, to_x, to_weight, None, None

    @staticmethod
    def jvp(ctx: Any, grad_y_t: Tensor | None, x_t: Tensor | None, weight_t: Tensor | None, *_: None) -> tuple:
        grad_y, x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.mask
        of_x = of_weight = of_bias = along_x = along_weight = None
        if grad_y_t is not None:
            of_x, of_weight, of_bias = _gradients(grad_y_t, x, weight, ctx.geometry, ctx.mask)
        elif wants_bias:
            of_bias = grad_y.new_zeros(weight.shape[0])
        if wants_x and weight_t is not None:
            along_x = _gradients(grad_y, x, weight_t, ctx.geometry, (True, False, False))[0]
        if wants_weight and x_t is not None:
            along_weight = _gradients(grad_y, x_t, weight, ctx.geometry, (False, True, False))[1]
        return _sum(of_x, along_x), _sum(of_weight, along_weight), of_bias
