"""The operators behind `pydistill.ops.bn_stat_match`, and their derivatives.

One pair serves the match alone and fused with the BatchNorm. With M elements per channel, s = scale, g = grad_y where
the ReLU is open:

    forward    mean, var of x; y = relu(s x + shift + residual)
    backward   grad_x = s g + grad_mean / M + 2 grad_var / M (x - mean)     grad_residual = g

The second derivatives are closed formulas in plain torch: correct to any order, with plain torch's memory use.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill.ops._operator import Operator, register_filled


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# In what follows: `saved` are (x, residual, scale, shift), of which all but x may be None, and the kept mean;
# for the backward they follow the gradients. `options` is (relu,).


def _empty_planes(x: Tensor) -> Tensor:
    """In the layout of x: channels adjacent in memory if they are so in x."""
    N, C, P = x.shape
    if x.stride(1) == 1 and C > 1 and P > 1:
        return x.new_empty_strided((N, C, P), (C * P, 1, C))
    return x.new_empty((N, C, P))


def _forward_fake(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    C, dtype = x.shape[1], compute_dtype(x)
    y = x.new_empty((0,)) if scale is None else _empty_planes(x)
    return y, x.new_empty((2, C), dtype=dtype), x.new_empty((C,), dtype=dtype)


def _backward_fake(
    grad_y: Tensor | None, grad_statistics: Tensor, x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    has_residual = residual is not None and grad_y is not None
    return _empty_planes(x), _empty_planes(x) if has_residual else x.new_empty((0,))


def _column(per_channel: Tensor) -> Tensor:
    return per_channel.unsqueeze(1)  # [C, 1], against [N, C, P]


def _sum(planes: Tensor) -> Tensor:
    return planes.sum((0, 2))  # [C]


@overload
def _wide(tensor: Tensor) -> Tensor: ...
@overload
def _wide(tensor: Tensor | None) -> Tensor | None: ...
def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(compute_dtype(tensor))


def _open(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, relu: bool) -> Tensor | float:
    """One where the ReLU passes gradients, zero elsewhere; x and the residual in the compute dtype."""
    if not relu:
        return 1.0
    before = _column(scale) * x + _column(shift)
    return (~((before if residual is None else before + residual) <= 0)).to(x.dtype)


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2]


class Operators:
    """The two operators of one library."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "bn_stat_match",
            library=library,
            tensors=4,
            fake=_forward_fake,
            vjp=self._forward_vjp,
            jvp=forward_jvp,
            vmap=batch_into_channels(lambda *args: self.forward.raw(*args), "ppcc", "psc"),
            kept=1,
        )
        self.backward: Operator = Operator(
            "bn_stat_match_backward",
            library=library,
            tensors=7,
            fake=_backward_fake,
            vjp=backward_vjp,
            jvp=backward_jvp,
            vmap=batch_into_channels(lambda *args: self.backward.raw(*args), "psppccc", "pp"),
        )

    def _forward_vjp(
        self, saved: tuple, options: tuple, ctx: Any, grad_y: Tensor | None, grad_statistics: Tensor | None, _: Any
    ) -> tuple:
        x, residual, scale, shift, mean = saved
        if grad_y is None and grad_statistics is None:
            return None, None, None, None
        if scale is None:
            grad_y = None  # of an output without elements
        if grad_statistics is None:
            grad_statistics = mean.new_zeros((2, x.shape[1]))
        grad_x, grad_residual = self.backward(
            grad_y, grad_statistics.contiguous(), x, residual, scale, shift, mean, *options
        )
        has_residual = residual is not None and grad_y is not None
        grads = [grad_x, grad_residual if has_residual else None, None, None]
        if grad_y is not None and any(ctx.needs_input_grad[2:4]):
            grads[2:] = affine_gradients(grad_y, x, residual, scale, shift, *options)
        return tuple(grads)


def affine_gradients(
    grad_y: Tensor, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of scale and shift."""
    x = _wide(x)
    g = _wide(grad_y) * _open(x, _wide(residual), scale, shift, relu)
    return _sum(g * x), _sum(g)


def forward_jvp(saved: tuple, options: tuple, *tangents: Any) -> tuple:
    x, residual, scale, shift = (_wide(t) for t in saved[:4])
    x_t, residual_t, scale_t, shift_t = (_wide(t) for t in tangents[:4])
    M = _count(x)
    apart = x - _column(_sum(x) / M)
    statistics_t = torch.stack([_sum(x_t) / M, 2 * _sum(apart * x_t) / M])
    if scale is None:
        return saved[0].new_zeros((0,)), statistics_t, None
    y_t = _column(scale) * x_t + _column(scale_t) * x + _column(shift_t)
    if residual is not None:
        y_t = y_t + residual_t
    return (y_t * _open(x, residual, scale, shift, *options)).to(saved[0].dtype), statistics_t, None


def backward_vjp(saved: tuple, options: tuple, u: Tensor, w: Tensor | None) -> tuple:
    """Along (u, w). The mean is a function of x: its part is included in that of x."""
    dtype = saved[2].dtype
    grad_y, grad_statistics, x, residual, scale, shift, mean = (_wide(t) for t in saved)
    u, w = _wide(u), _wide(w)
    M = _count(x)
    to_x = 2 * _column(grad_statistics[1]) / M * (u - _column(_sum(u) / M))
    to_statistics = torch.stack([_sum(u) / M, 2 * _sum(u * (x - _column(mean))) / M])
    if grad_y is None:
        return None, to_statistics, to_x.to(dtype), None, None, None, None
    gate = _open(x, residual, scale, shift, *options)
    to_grad_y = (_column(scale) * u if residual is None or w is None else _column(scale) * u + w) * gate
    to_scale = _sum(grad_y * gate * u)
    return to_grad_y.to(dtype), to_statistics, to_x.to(dtype), None, to_scale, None, None


def backward_jvp(saved: tuple, options: tuple, *tangents: Any) -> tuple:
    dtype = saved[2].dtype
    grad_y, grad_statistics, x, residual, scale, shift, mean = (_wide(t) for t in saved)
    grad_y_t, grad_statistics_t, x_t, _, scale_t, _, _ = (_wide(t) for t in tangents)
    M = _count(x)
    of_mean_t, of_var_t = grad_statistics_t.unbind()
    grad_x_t = _column(of_mean_t) / M + 2 * _column(of_var_t) / M * (x - _column(mean))
    grad_x_t = grad_x_t + 2 * _column(grad_statistics[1]) / M * (x_t - _column(_sum(x_t) / M))
    if grad_y is None:
        return grad_x_t.to(dtype), saved[2].new_zeros((0,))
    gate = _open(x, residual, scale, shift, *options)
    grad_x_t = grad_x_t + (_column(scale) * grad_y_t + _column(scale_t) * grad_y) * gate
    residual_t = saved[2].new_zeros((0,)) if residual is None else (grad_y_t * gate).to(dtype)
    return grad_x_t.to(dtype), residual_t


def batch_into_channels(op: Any, tensors: str, outputs: str) -> Any:
    """The vmap rule: channels are independent, so a batch dimension becomes more of them.

    A letter per tensor: "p" for planes [N, C, P], "s" for statistics [2, C], "c" for a vector [C].
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        B = info.batch_size
        folded = []
        for kind, arg, dim in zip(tensors, args, in_dims[: len(tensors)], strict=False):
            if arg is not None:
                arg = arg.unsqueeze(0).expand(B, *arg.shape) if dim is None else arg.movedim(dim, 0)
                # [B, C] -> [B C], else [B, n, C, ...] -> [n, B C, ...]
                arg = arg.reshape(-1) if kind == "c" else arg.transpose(0, 1).flatten(1, 2)
                arg = arg if kind == "p" else arg.contiguous()
            folded.append(arg)
        found = op(*folded, *args[len(tensors) :])
        unfolded = tuple(
            out.new_empty((B, 0))
            if out.numel() == 0
            else out.unflatten(0, (B, -1))
            if kind == "c"
            else out.unflatten(1, (B, -1)).transpose(0, 1)
            for kind, out in zip(outputs, found, strict=True)
        )
        return unfolded, tuple(0 for _ in unfolded)

    return rule


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import bn_stat_match as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "bn_stat_match", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "bn_stat_match_backward", _backward_fake, _triton_fill("backward"))

native, triton = Operators("pydistill"), Operators("pydistill_triton")
