"""The match of a batch's channel statistics with those of a BatchNorm, alone and fused with that BatchNorm.

One pair of operators serves both. With M elements a channel, s = scale, g = grad_y where the ReLU is open:

    forward    mean, var of x; y = relu(s x + shift + residual)
    backward   grad_x = s g + grad_mean / M + 2 grad_var / M (x - mean)     grad_residual = g

What is left, from mean and var to the loss, are vectors of C numbers in plain torch. The second derivatives are closed
formulas in plain torch: they are right to any order, and take the memory that plain torch takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.reference.bn_stat_match import Reduction

BACKENDS = ("reference", "cpu", "cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bn_stat_match(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    w_mean: float = 1.0,
    w_var: float = 1.0,
    reduction: Reduction = "norm",
    unbiased: bool = False,
    backend: str = "auto",
) -> Tensor:
    """How far the channel means and variances of ``x`` are from ``running_mean`` and ``running_var``.

    The regulariser of DeepInversion (Yin et al., CVPR 2020) and SRe2L (Yin, Xing, Shen, NeurIPS 2023); with ``w_var``
    the decoupled variance of DWA (Du et al., NeurIPS 2024). Equivalent to, with ``d`` all dimensions but 1,
    ``w_mean * (x.mean(d) - running_mean).norm() + w_var * (x.var(d, unbiased=unbiased) - running_var).norm()``,
    in one read of ``x`` and without a copy of it; the backward reads ``x`` and writes its gradient.

    Differentiable to any order in ``x``, ``running_mean`` and ``running_var``, in reverse and forward mode, under
    ``torch.func`` and ``torch.compile``; past the first in plain torch. The gradient of a norm that is zero is zero.
    Deterministic: equal bits from run to run, over thread counts and, on the CPU, over instruction sets. NCHW and
    channels-last tensors are read as they are, and so are others of which the dimensions behind the second can be
    seen as one; the rest is copied.

    Args:
        x: ``[N, C, ...]``; float32, float64, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        running_mean: ``[C]``, of any floating-point dtype.
        running_var: ``[C]``.
        w_mean: weight of the means' distance.
        w_var: weight of the variances' distance.
        reduction: "norm" for distances in L2, "sq" for their squares, i.e. sums over the channels.
        unbiased: whether the variance of ``x`` divides by M - 1 (M elements a channel) and not, as a BatchNorm that
            normalises does, by M.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu", "cuda" or "triton".

    Returns:
        The loss, float32 (float64 for float64).

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit, or there are too few elements for a variance.
        NotImplementedError: the backend cannot run here.
    """
    _check(x, running_mean, running_var, reduction, unbiased)
    chosen = choose_backend("bn_stat_match", backend, x.device, BACKENDS)
    weights = (w_mean, w_var, reduction, unbiased)
    if chosen == "reference":
        return reference.bn_stat_match(
            x, running_mean, running_var, w_mean=w_mean, w_var=w_var, reduction=reduction, unbiased=unbiased
        )
    ops = _triton if chosen == "triton" else _native
    _, statistics, _ = ops.forward(_as_planes(x), None, None, None, False)
    return _loss(statistics, running_mean, running_var, x.numel() // x.shape[1], weights)


def bn_match_forward(
    x: Tensor,
    bn: nn.Module,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    w_mean: float = 1.0,
    w_var: float = 1.0,
    reduction: Reduction = "norm",
    unbiased: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A frozen BatchNorm and `bn_stat_match` of its input, in one read of that input and one write of the output.

    Equivalent to ``y = bn(x)`` in evaluation mode, ``y = y + residual`` and ``y = y.relu()`` where asked for, and
    ``bn_stat_match(x, bn.running_mean, bn.running_var, ...)``; but that in bfloat16 and float16 nothing is rounded
    before ``y`` is. The backward reads ``x`` and the gradient of ``y`` once and writes that of ``x``; beside inputs,
    nothing of their size is kept for it.

    Differentiable to any order in ``x``, ``residual`` and the BatchNorm's parameters; these and second derivatives in
    plain torch. What `bn_stat_match` says of layouts, bits and zero norms holds here too.

    Args:
        x: ``[N, C, ...]``; float32, float64, bfloat16 or float16.
        bn: an ``nn.BatchNorm1d``, ``2d`` or ``3d`` in evaluation mode with running statistics.
        relu: whether a ReLU follows.
        residual: what is added before the ReLU, of the shape and dtype of ``x``.
        w_mean: as of `bn_stat_match`, as are the next four.
        w_var: see there.
        reduction: see there.
        unbiased: see there.
        backend: see there.

    Returns:
        ``y``, as ``x`` in shape, dtype and layout, and the loss.

    Raises:
        TypeError: an argument is of another type than it should be.
        ValueError: the BatchNorm is in training mode or tracks no statistics, a shape, device or option does not fit.
        NotImplementedError: the backend cannot run here.
    """
    check_frozen(bn)
    _check(x, bn.running_mean, bn.running_var, reduction, unbiased)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            wanted, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, residual))
            raise ValueError(f"residual: expected {wanted} as x, got {got}")
    chosen = choose_backend("bn_stat_match", backend, x.device, BACKENDS)
    weights = (w_mean, w_var, reduction, unbiased)
    if chosen == "reference":
        options = {"w_mean": w_mean, "w_var": w_var, "reduction": reduction, "unbiased": unbiased}
        return reference.bn_match_forward(x, bn, relu=relu, residual=residual, **options)
    ops = _triton if chosen == "triton" else _native
    planes = None if residual is None else _as_planes(residual)
    y, statistics, _ = ops.forward(_as_planes(x), planes, *_affine(bn, _compute_dtype(x)), relu)
    loss = _loss(statistics, bn.running_mean, bn.running_var, x.numel() // x.shape[1], weights)
    return y.view(x.shape), loss


def check_frozen(bn: nn.Module) -> None:
    """Raise unless ``bn`` is a BatchNorm that normalises by its running statistics."""
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"bn: expected nn.BatchNorm1d, 2d or 3d, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics to match, got a BatchNorm with track_running_stats=False")
    if bn.training:
        raise ValueError("bn: expected a BatchNorm in evaluation mode, got one in training mode; call model.eval()")


def _check(x: Tensor, running_mean: Tensor, running_var: Tensor, reduction: str, unbiased: bool) -> None:
    if reduction not in ("norm", "sq"):
        raise ValueError(f"reduction: expected 'norm' or 'sq', got {reduction!r}")
    for name, tensor in (("x", x), ("running_mean", running_mean), ("running_var", running_var)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, ...], got shape {list(x.shape)}")
    least = 2 if unbiased else 1
    if x.shape[1] == 0 or x.numel() // x.shape[1] < least:
        raise ValueError(f"x: expected at least {least} elements in each of some channels, got shape {list(x.shape)}")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"{name}: expected [{x.shape[1]}] for x {list(x.shape)}, got shape {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")


def _as_planes(x: Tensor) -> Tensor:
    """``[N, C, P]``: a view for every dense memory format."""
    return x.reshape(*x.shape[:2], -1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(bn: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The frozen BatchNorm as ``scale x + shift``."""
    scale = (bn.running_var.to(dtype) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -bn.running_mean.to(dtype) * scale
    return scale, shift if bn.bias is None else shift + bn.bias.to(dtype)


def _loss(statistics: Tensor, running_mean: Tensor, running_var: Tensor, M: int, weights: tuple) -> Tensor:
    """In few operations: on twenty layers of a few hundred numbers each takes longer than its arithmetic."""
    w_mean, w_var, reduction, unbiased = weights
    if unbiased:
        statistics = torch.stack([statistics[0], statistics[1] * (M / (M - 1))])
    apart = statistics - torch.stack([running_mean, running_var]).to(statistics.dtype)
    # torch's norm has the gradient zero where it is zero itself
    terms = apart.square().sum(1) if reduction == "sq" else torch.linalg.vector_norm(apart, dim=1)
    if w_mean == w_var:
        total = terms.sum()
        return total if w_mean == 1 else w_mean * total
    return w_mean * terms[0] + w_var * terms[1]


# In what follows: `saved` are (x, residual, scale, shift), of which all but x may be None, and the mean that was kept;
# behind the gradients, of the backward. `options` is (relu,).


def _empty_planes(x: Tensor) -> Tensor:
    """In the layout of x: channels neighbours where they are there."""
    N, C, P = x.shape
    if x.stride(1) == 1 and C > 1 and P > 1:
        return x.new_empty_strided((N, C, P), (C * P, 1, C))
    return x.new_empty((N, C, P))


def _forward_fake(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    C, dtype = x.shape[1], _compute_dtype(x)
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


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(_compute_dtype(tensor))


def _open(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, relu: bool) -> Tensor | float:
    """One where y has a derivative, zero elsewhere; x and the residual in the dtype of computation."""
    if not relu:
        return 1.0
    before = _column(scale) * x + _column(shift)
    return (~((before if residual is None else before + residual) <= 0)).to(x.dtype)


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2]


class _Operators:
    """The two operators of one library."""

    def __init__(self, library: str):
        self.forward = Operator(
            "bn_stat_match",
            library=library,
            tensors=4,
            fake=_forward_fake,
            vjp=self._forward_vjp,
            jvp=_forward_jvp,
            vmap=_batch_into_channels(lambda *args: self.forward.raw(*args), "ppcc", "psc"),
            kept=1,
        )
        self.backward = Operator(
            "bn_stat_match_backward",
            library=library,
            tensors=7,
            fake=_backward_fake,
            vjp=_backward_vjp,
            jvp=_backward_jvp,
            vmap=_batch_into_channels(lambda *args: self.backward.raw(*args), "psppccc", "pp"),
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
            wide = _wide(x)
            g = _wide(grad_y) * _open(wide, _wide(residual), scale, shift, *options)
            grads[2:] = _sum(g * wide), _sum(g)
        return tuple(grads)


def _forward_jvp(saved: tuple, options: tuple, *tangents: Tensor | None) -> tuple:
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


def _backward_vjp(saved: tuple, options: tuple, u: Tensor, w: Tensor) -> tuple:
    """Along (u, w). The mean is what it is of x: its part stands in that of x."""
    dtype = saved[2].dtype
    grad_y, grad_statistics, x, residual, scale, shift, mean = (_wide(t) for t in saved)
    u, w = _wide(u), _wide(w)
    M = _count(x)
    to_x = 2 * _column(grad_statistics[1]) / M * (u - _column(_sum(u) / M))
    to_statistics = torch.stack([_sum(u) / M, 2 * _sum(u * (x - _column(mean))) / M])
    if grad_y is None:
        return None, to_statistics, to_x.to(dtype), None, None, None, None
    gate = _open(x, residual, scale, shift, *options)
    to_grad_y = (_column(scale) * u if residual is None else _column(scale) * u + w) * gate
    to_scale = _sum(grad_y * gate * u)
    return to_grad_y.to(dtype), to_statistics, to_x.to(dtype), None, to_scale, None, None


def _backward_jvp(saved: tuple, options: tuple, *tangents: Tensor | None) -> tuple:
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


def _batch_into_channels(op: Any, tensors: str, outputs: str) -> Any:
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


# kept for as long as the operators are: torch forgets those of a library that is collected
_triton_library = torch.library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "bn_stat_match", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "bn_stat_match_backward", _backward_fake, _triton_fill("backward"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
