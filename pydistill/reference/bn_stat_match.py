"""Definition of the match of BatchNorm statistics, alone and with the frozen BatchNorm that it belongs to."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["norm", "sq"]


def norm(x: Tensor) -> Tensor:
    """The norm over the last dimension, even if squares overflow or underflow; its gradient is zero where it is."""
    largest = x.detach().abs().amax(-1).clamp(torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).max)
    unit = torch.where((largest > 1e-15) & (largest < 1e15), 1, largest)  # ordinary numbers get no extra rounding
    return unit * torch.linalg.vector_norm(x / unit.unsqueeze(-1), dim=-1)


def bn_stat_match(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    w_mean: float = 1.0,
    w_var: float = 1.0,
    kind: Kind = "norm",
    unbiased: bool = False,
) -> Tensor:
    """``w_mean |mean(x) - running_mean| + w_var |var(x) - running_var|``, per channel; "sq" has squared norms."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [d for d in range(x.dim()) if d != 1]
    apart = x.mean(others) - running_mean, x.var(others, unbiased=unbiased) - running_var
    of_mean, of_var = (d.square().sum() if kind == "sq" else norm(d) for d in apart)
    return w_mean * of_mean + w_var * of_var


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
) -> tuple[Tensor, Tensor]:
    """``pool(relu(bn(x) + residual))`` with the running statistics, and `bn_stat_match` of x against them."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (bn.running_var + bn.eps).rsqrt()
    y = (x.to(wide) - bn.running_mean.view(shape)) * scale.view(shape)
    if bn.weight is not None:
        y = y * bn.weight.view(shape) + bn.bias.view(shape)
    y = y.to(wide) if residual is None else y.to(wide) + residual.to(wide)
    match = {"w_mean": w_mean, "w_var": w_var, "kind": kind, "unbiased": unbiased}
    loss = bn_stat_match(x, bn.running_mean, bn.running_var, **match)
    y = (y.relu() if relu else y).to(x.dtype)
    return y if pool is None else F.max_pool2d(y, *pool), loss
