r"""Maximum mean discrepancy under a sum of Gaussian kernels, from one Gram matrix.

With the joined rows z_1 .. z_N of x and y, centred, D_ij = |z_i|^2 + |z_j|^2 - 2 <z_i, z_j> and the kernel
k(D) = sum_b exp(-D / b), the loss is the sum of W_ij k(D_ij), where W is 1 / n^2 among the rows of x, 1 / m^2 among
those of y and -1 / (n m) between them. With S_ij = W_ij k'(D_ij), a symmetric matrix,

    d loss / d z_i = 4 sum_j S_ij (z_i - z_j) = 4 (S 1)_i z_i - 4 (S z)_i

so that forward and backward take one product with an N x N matrix each. If the widths b are powers of two of one
another, a kernel is the square of the next wider one, and one exponential is enough for all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pydistill.ops._operator import check_plain_backend

__all__ = ["mmd"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LEAST_UNIT = 0.8  # the smallest unit of the rows is the smallest normal number to this power


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernels: int = 5,
    factor: float = 2.0,
    bandwidth: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared maximum mean discrepancy (biased) of two samples, under ``kernels`` Gaussian kernels.

    Equivalent to `pydistill.reference.mmd` without its cube of (n + m)^2 d numbers. FedLGD (Huang et al., TMLR 2024)
    keeps clients' features together with it, as does domain adaptation since Long et al., ICML 2015. The widths are
    ``bandwidth / factor ** (kernels // 2) * factor ** i``, a kernel ``exp(-|x_i - y_j|^2 / width)``.

    Differentiable twice in x and y, with the bandwidth a constant. Distances come from inner products of the centred
    rows: their error is a rounding of the squared distance from the mean, so a given bandwidth should not be many
    orders smaller than that. Equal bits across runs, but not across thread counts, by which torch's matrix product
    splits its sums.

    Args:
        x: ``[n, d]`` with at least one element; float32, float64, bfloat16 or float16, computed in float32 (float64 for
            float64).
        y: ``[m, d]`` with at least one element, dtype and device of x.
        kernels: number of kernels.
        factor: ratio of one width to the next, greater than 1.
        bandwidth: of the middle kernel, positive; by default the mean squared distance of two different rows, a
            constant in the derivative. Where all rows are equal, the loss and its gradients are zero.
        backend: "auto" or "reference": it is plain torch on every device.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: x or y is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device or option does not fit.
    """
    _check(x, y, kernels, factor, bandwidth)
    check_plain_backend("mmd", backend)
    x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    options = (kernels, float(factor), bandwidth)
    if torch.compiler.is_dynamo_compiling():  # it differentiates this itself
        z, unit = _centred(x, y)
        return _loss_and_slopes(z, unit, len(x), *options)[0]
    with torch.autocast(x.device.type, enabled=False):
        return _MMD.apply(x, y, *options)[0]


class _MMD(torch.autograd.Function):
    """Keeps the matrix S, so that the gradient is one product; a gradient with a graph is built from x and y."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, kernels: int, factor: float, bandwidth: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, unit = _centred(x, y)
        return *_loss_and_slopes(z, unit, len(x), kernels, factor, bandwidth), z, unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, y, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, y, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
        x, y, slopes, z, unit = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was kept is constant, so second derivatives would lack its own
            z, unit = _centred(x, y)
            slopes = _loss_and_slopes(z, unit, len(x), *ctx.options)[1]
        # of z: 4 grad (diag(slopes 1) - slopes) z, the factor on the smaller matrix
        laplacian = (torch.diag_embed(slopes.sum(1)) - slopes) * (4 * grad / unit)
        d_x, d_y = (laplacian @ z).split([len(x), len(y)])
        return d_x, d_y, None, None, None


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The joined rows minus their mean, in units of their largest element, whose square may overflow; and the unit."""
    rows = torch.cat([x, y])
    rows = rows - rows[0].detach()  # makes equal rows zero, which the rounding of their mean would not
    rows = rows - rows.mean(0)
    unit = rows.detach().abs().amax().clamp_min(torch.finfo(rows.dtype).tiny ** _LEAST_UNIT)
    return rows / unit, unit


def _loss_and_slopes(
    z: Tensor, unit: Tensor, n: int, kernels: int, factor: float, bandwidth: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of rows ``z unit``, the first n of which are x's, and S ``[N, N]`` in units of ``unit ** -2``."""
    N, m = len(z), len(z) - n
    gram = z @ z.T
    norms = gram.diagonal()
    distances = (norms[:, None] + norms - 2 * gram).clamp_min(0)
    distances = distances.masked_fill(torch.eye(N, dtype=torch.bool, device=z.device), 0)  # [N, N]
    if bandwidth is None:
        bandwidth = distances.detach().sum() / (N * N - N)
        bandwidth = torch.where(bandwidth == 0, 1, bandwidth)  # equal rows have distance zero in any units
    else:
        bandwidth = (bandwidth / unit / unit).clamp_min(torch.finfo(z.dtype).tiny)
    narrowest = bandwidth / factor ** (kernels // 2)
    rates = [1 / (narrowest * factor**i) for i in reversed(range(kernels))]  # the widest kernel's first
    value = torch.exp(distances * -rates[0])
    kernel, slope = value, value * rates[0]
    for rate in rates[1:]:
        value = value.square() if factor == 2 else torch.exp(distances * -rate)
        kernel, slope = kernel + value, slope + value * rate
    weights = torch.cat([z.new_full((n,), 1 / n), z.new_full((m,), -1 / m)])
    loss = torch.stack([kernel[:n, :n].mean(), kernel[n:, n:].mean(), -2 * kernel[:n, n:].mean()]).sum()
    return loss, -(weights[:, None] * weights) * slope


def _check(x: Tensor, y: Tensor, kernels: int, factor: float, bandwidth: float | Tensor | None) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dim() != 2 or not tensor.numel():
            raise ValueError(f"{name}: expected [rows, d] with at least one element, got {list(tensor.shape)}")
    if y.shape[1] != x.shape[1] or y.dtype != x.dtype or y.device != x.device:
        wanted = f"{x.dtype} [m, {x.shape[1]}] on {x.device} as x"
        raise ValueError(f"y: expected {wanted}, got {y.dtype} {list(y.shape)} on {y.device}")
    if isinstance(kernels, bool) or not isinstance(kernels, int) or kernels < 1:
        raise ValueError(f"kernels: expected a whole number of at least 1, got {kernels!r}")
    if not 1 < factor < math.inf:
        raise ValueError(f"factor: expected a finite number greater than 1, got {factor}")
    if isinstance(bandwidth, Tensor):
        if bandwidth.requires_grad or bandwidth.dim():
            got = f"shape {list(bandwidth.shape)}, requires_grad={bandwidth.requires_grad}"
            raise ValueError(f"bandwidth: expected a constant scalar, got {got}")
    elif bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth: expected a positive finite number, got {bandwidth}")
