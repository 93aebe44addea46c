"""The match of a batch's channel statistics with those of a BatchNorm, alone and fused with that BatchNorm.

A kernel leaves mean and variance; what is left from there to the loss are vectors of C numbers in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill import reference
from pydistill._arguments import check_choice
from pydistill._devices import to_device
from pydistill._renamed import renamed
from pydistill.ops._bn_match_pool import forward as bn_match_pool
from pydistill.ops._bn_stat_match_operators import compute_dtype, native, triton
from pydistill.ops._operator import choose_backend
from pydistill.ops.max_pool2d import check_pooling
from pydistill.reference.bn_stat_match import Kind, norm

BACKENDS = ("reference", "cpu", "cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@renamed(reduction="kind")
def bn_stat_match(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    w_mean: float = 1.0,
    w_var: float = 1.0,
    kind: Kind = "norm",
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
        kind: of distance: "norm" for the L2 norms over the channels, "sq" for their squares.
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
    _check(x, running_mean, running_var, kind, unbiased)
    chosen = choose_backend("bn_stat_match", backend, x.device, BACKENDS)
    if chosen == "reference":
        return reference.bn_stat_match(
            x, running_mean, running_var, w_mean=w_mean, w_var=w_var, kind=kind, unbiased=unbiased
        )
    ops = triton if chosen == "triton" else native
    _, statistics, _ = ops.forward(_as_planes(x), None, None, None, False)
    statistics = _unbiased(statistics, x) if unbiased else statistics
    return _loss(statistics, running_mean, running_var, w_mean, w_var, kind)


@renamed(reduction="kind")
def bn_match_forward(
    x: Tensor,
    bn: nn.Module,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    pool: tuple[int, int, int] | None = None,
    w_mean: float = 1.0,
    w_var: float = 1.0,
    kind: Kind = "norm",
    unbiased: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A frozen BatchNorm and `bn_stat_match` of its input, in one read of that input and one write of the output.

    Equivalent to ``y = bn(x)`` in evaluation mode, ``y = y + residual``, ``y = y.relu()`` and
    ``y = F.max_pool2d(y, *pool)`` where asked for, and ``bn_stat_match(x, bn.running_mean, bn.running_var, ...)``; but
    that in bfloat16 and float16 nothing is rounded before ``y`` is, or what is pooled. The backward reads ``x`` and the
    gradient of ``y`` once and writes that of ``x``; beside inputs, nothing of their size is kept for it. With a pooling
    behind it the CPU's kernel writes nothing of the size of ``x`` in the forward pass, and nothing else of it on the
    way back; on other devices torch pools.

    Differentiable to any order in ``x``, ``residual`` and the BatchNorm's parameters; these and second derivatives in
    plain torch. What `bn_stat_match` says of layouts, bits and zero norms holds here too.

    Args:
        x: ``[N, C, ...]``; float32, float64, bfloat16 or float16.
        bn: an ``nn.BatchNorm1d``, ``2d`` or ``3d`` in evaluation mode with running statistics.
        relu: whether a ReLU follows.
        residual: what is added before the ReLU, of the shape and dtype of ``x``.
        pool: side of square windows, stride and padding of a max pooling behind all that, for ``x`` ``[N, C, H, W]``
            and without a residual; sizes as of `pydistill.ops.max_pool2d`. A ResNet's stem has (3, 2, 1).
        w_mean: as of `bn_stat_match`, as are the next four.
        w_var: see there.
        kind: see there.
        unbiased: see there.
        backend: see there.

    Returns:
        ``y``, as ``x`` in shape, dtype and layout (pooled on the CPU: in channels-last memory), and the loss.

    Raises:
        TypeError: an argument is of another type than it should be.
        ValueError: the BatchNorm is in training mode or tracks no statistics, a shape, device or option does not fit.
        NotImplementedError: the backend cannot run here.
    """
    if backend == "reference":
        _check_forward(x, bn, residual, pool, kind, unbiased)
        return reference.bn_match_forward(
            x,
            bn,
            relu=relu,
            residual=residual,
            pool=pool,
            w_mean=w_mean,
            w_var=w_var,
            kind=kind,
            unbiased=unbiased,
        )
    y, statistics = statistics_forward(x, bn, relu, residual, pool, kind, unbiased, backend)
    return y, _loss(statistics, *_running(bn), w_mean, w_var, kind)


def statistics_forward(
    x: Tensor,
    bn: nn.Module,
    relu: bool,
    residual: Tensor | None,
    pool: tuple[int, int, int] | None,
    kind: str,
    unbiased: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`bn_match_forward` on a kernel before the distance: ``y``, and means and variances ``[2, C]``."""
    _check_forward(x, bn, residual, pool, kind, unbiased)
    chosen = choose_backend("bn_stat_match", backend, x.device, BACKENDS)
    affine = _affine(bn, compute_dtype(x))
    if pool is not None and chosen == "cpu":
        y, statistics, _, _ = bn_match_pool(x, *affine, relu, *pool)
    else:
        ops = triton if chosen == "triton" else native
        planes = None if residual is None else _as_planes(residual)
        y, statistics, _ = ops.forward(_as_planes(x), planes, *affine, relu)
        y = y.view(x.shape)
        y = y if pool is None else F.max_pool2d(y, *pool)
    return y, _unbiased(statistics, x) if unbiased else statistics


def statistics_of(x: Tensor, bn: nn.Module, kind: str, unbiased: bool) -> Tensor:
    """Means and variances ``[2, C]`` of what a frozen BatchNorm, of whatever forward, is given."""
    check_frozen(bn)
    _check(x, *_running(bn), kind, unbiased)
    ops = triton if choose_backend("bn_stat_match", "auto", x.device, BACKENDS) == "triton" else native
    _, statistics, _ = ops.forward(_as_planes(x), None, None, None, False)
    return _unbiased(statistics, x) if unbiased else statistics


def check_frozen(bn: nn.Module) -> None:
    """Raise unless ``bn`` is a BatchNorm that normalises by its running statistics."""
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"bn: expected nn.BatchNorm1d, 2d or 3d, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics to match, got a BatchNorm with track_running_stats=False")
    if bn.training:
        raise ValueError("bn: expected a BatchNorm in evaluation mode, got one in training mode; call model.eval()")


def _check_forward(
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None,
    pool: tuple[int, int, int] | None,
    kind: str,
    unbiased: bool,
) -> None:
    check_frozen(bn)
    _check(x, *_running(bn), kind, unbiased)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            wanted, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, residual))
            raise ValueError(f"residual: expected {wanted} as x, got {got}")
    if pool is not None:
        if residual is not None:
            raise ValueError("pool: expected None with a residual")
        if not isinstance(pool, tuple) or len(pool) != 3:
            raise TypeError(f"pool: expected (kernel_size, stride, padding) or None, got {pool!r}")
        check_pooling(x, *pool)


def _check(x: Tensor, running_mean: Tensor, running_var: Tensor, kind: str, unbiased: bool) -> None:
    check_choice("kind", kind, ("norm", "sq"))
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


def _running(bn: nn.Module) -> tuple[Tensor, Tensor]:
    return cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)


def _affine(bn: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The frozen BatchNorm as ``scale x + shift``."""
    mean, var = (each.to(dtype) for each in _running(bn))
    weight, bias = cast("tuple[Tensor | None, Tensor | None]", (bn.weight, bn.bias))
    scale = (var + cast(float, bn.eps)).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    return scale, -mean * scale if bias is None else torch.addcmul(bias.to(dtype), mean, scale, value=-1)


def _unbiased(statistics: Tensor, x: Tensor) -> Tensor:
    M = x.numel() // x.shape[1]
    return torch.stack([statistics[0], statistics[1] * (M / (M - 1))])


def _loss(
    statistics: Tensor, running_mean: Tensor, running_var: Tensor, w_mean: float, w_var: float, kind: str
) -> Tensor:
    apart = statistics - torch.stack([running_mean, running_var]).to(statistics.dtype)
    terms = apart.square().sum(1) if kind == "sq" else norm(apart)
    return w_mean * terms.sum() if w_mean == w_var else w_mean * terms[0] + w_var * terms[1]


def summed_loss(
    statistics: Sequence[Tensor], norms: Sequence[nn.Module], weights: Sequence[tuple[float, float]], kind: str
) -> Tensor:
    """The weighted sum of `_loss` over layers, in as many operations as of one: on twenty layers of a few hundred
    numbers each takes longer than its arithmetic."""
    device, dtype = statistics[0].device, torch.float64
    means = torch.cat([_running(bn)[0].to(device) for bn in norms])
    variances = torch.cat([_running(bn)[1].to(device) for bn in norms])
    apart = torch.cat([each.to(device) for each in statistics], 1).to(dtype) - torch.stack([means, variances])
    sizes = [each.shape[1] for each in statistics]
    layer = torch.repeat_interleave(torch.tensor(sizes, device="cpu"), output_size=sum(sizes))
    of_layer = to_device(F.one_hot(layer, len(norms)).to(dtype), device)
    terms = apart.square() @ of_layer  # [2, layers]
    if kind == "norm":
        some = terms > 0  # as torch's norm, with the gradient zero where it is zero itself
        terms = torch.where(some, terms, 1).sqrt() * some
    scaled = terms * to_device(torch.tensor(weights, dtype=dtype, device="cpu"), device).t()
    return scaled.sum().to(statistics[0].dtype)
