"""`bn_stat_match`'s operators with a max pooling after the BatchNorm: the tensor in between is not written.

Every formula is that of the two operators in sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydistill.ops._bn_stat_match_operators import (
    affine_gradients,
    backward_jvp,
    backward_vjp,
    batch_into_channels,
    compute_dtype,
    forward_jvp,
    native,
)
from pydistill.ops._operator import Operator
from pydistill.ops.max_pool2d import empty_images, gather, pooled_shape, scatter

# In what follows: `saved` are (x, scale, shift) and what was kept, the winners' numbers in their windows and the mean;
# for the backward (grad_y, grad_statistics, x, which, scale, shift, mean). `options`: (relu, kernel, stride, padding).


def _forward_fake(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, *pool: int) -> tuple[Tensor, ...]:
    shape, C, dtype = pooled_shape(x, *pool), x.shape[1], compute_dtype(x)
    statistics, mean = x.new_empty((2, C), dtype=dtype), x.new_empty((C,), dtype=dtype)
    return empty_images(shape, x, x.dtype), statistics, empty_images(shape, x, torch.uint8), mean


def _backward_fake(grad_y: Tensor, grad_statistics: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return empty_images(tuple(x.shape), x, x.dtype)


def _planes(images: Tensor) -> Tensor:
    return images.reshape(*images.shape[:2], -1)  # [N, C, P]


def _forward_vjp(
    saved: tuple, options: tuple, ctx: Any, grad_y: Tensor | None, grad_statistics: Tensor | None, *_: Any
) -> tuple:
    x, scale, shift, which, mean = saved
    relu, *pool = options
    if grad_y is None and grad_statistics is None:
        return None, None, None
    if grad_statistics is None:
        grad_statistics = mean.new_zeros((2, x.shape[1]))
    grad_statistics = grad_statistics.contiguous()
    if grad_y is None:
        grad_x, _ = native.backward(None, grad_statistics, _planes(x), None, None, None, mean, False)
        return grad_x.view(x.shape), None, None
    grads = [backward(grad_y, grad_statistics, x, which, scale, shift, mean, *options), None, None]
    if any(ctx.needs_input_grad[1:3]):
        between = scatter(grad_y, which, *x.shape[2:], *pool)
        grads[1:] = affine_gradients(_planes(between), _planes(x), None, scale, shift, relu)
    return tuple(grads)


def _forward_jvp(saved: tuple, options: tuple, x_t: Tensor, scale_t: Tensor, shift_t: Tensor) -> tuple:
    x, scale, shift = saved[:3]
    relu, *pool = options
    y_t, statistics_t, _ = forward_jvp((_planes(x), None, scale, shift), (relu,), _planes(x_t), None, scale_t, shift_t)
    which = forward(x, scale, shift, *options)[2]  # forward mode has no kept outputs
    return gather(y_t.view(x.shape), which, *pool), statistics_t, None, None


def _through_images(saved: tuple, options: tuple) -> tuple[tuple, tuple]:
    """The arguments of `bn_stat_match`'s backward, with the pooling's gradient as grad_y."""
    grad_y, grad_statistics, x, which, scale, shift, mean = saved
    relu, *pool = options
    between = scatter(grad_y, which, *x.shape[2:], *pool)
    return (_planes(between), grad_statistics, _planes(x), None, scale, shift, mean), (relu,)


def _backward_vjp(saved: tuple, options: tuple, u: Tensor) -> tuple:
    x, which = saved[2:4]
    to_between, to_statistics, to_x, _, to_scale, _, _ = backward_vjp(
        *_through_images(saved, options), _planes(u), None
    )
    to_grad_y = gather(to_between.view(x.shape), which, *options[1:])
    return to_grad_y, to_statistics, to_x.view(x.shape), None, to_scale, None, None


def _backward_jvp(saved: tuple, options: tuple, *tangents: Tensor) -> Tensor:
    x, which = saved[2:4]
    of_planes, _ = _through_images((*tangents[:3], which, *tangents[4:]), options)
    return backward_jvp(*_through_images(saved, options), *of_planes)[0].view(x.shape)


def _backward_vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    rule = batch_into_channels(lambda *args: (backward.raw(*args),), "psppccc", "p")
    (grad_x,), (dim,) = rule(info, in_dims, *args)
    return grad_x, dim


forward: Operator = Operator(
    "bn_match_pool",
    tensors=3,
    fake=_forward_fake,
    vjp=_forward_vjp,
    jvp=_forward_jvp,
    vmap=batch_into_channels(lambda *args: forward.raw(*args), "pcc", "pspc"),
    kept=2,
)
backward: Operator = Operator(
    "bn_match_pool_backward",
    tensors=7,
    fake=_backward_fake,
    vjp=_backward_vjp,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)
