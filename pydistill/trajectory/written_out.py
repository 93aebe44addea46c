"""Norms and attention as plain operators, which forward over reverse mode can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WrittenOut"]


class WrittenOut(TorchFunctionMode):
    """Norms and attention in elementary operations: torch has no forward derivative of their fused kernels' backward,
    and the compiler fuses them anyway."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return _WRITTEN_OUT.get(function, function)(*args, **kwargs)


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    wide, (N, C), dims = _wide(x), x.shape[:2], tuple(range(2, x.dim()))

    def mean(of: Tensor) -> Tensor:  # over each channel first: a view of the whole would lose channels-last strides
        each = of.mean(dims).view(N, num_groups, C // num_groups)
        return each.mean(2, keepdim=True).expand_as(each).reshape(N, C, *(1 for _ in dims))

    centred = wide - mean(wide)
    y = centred * torch.rsqrt(mean(centred.square()) + eps)
    return _affine(y, weight, bias).to(x.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *(1,) * (y.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    wide, shape = _wide(x), (-1, *(1,) * (x.dim() - 2))
    if not training:
        assert running_mean is not None
        assert running_var is not None
        y = (wide - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape)
        return _affine(y, weight, bias).to(x.dtype)
    dims = (0, *range(2, x.dim()))
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    var = centred.square().mean(dims, keepdim=True)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.detach().flatten().to(running_mean.dtype), momentum)
            running_var.lerp_(var.detach().flatten().to(running_var.dtype) * (count / (count - 1)), momentum)
    return _affine(centred * torch.rsqrt(var + eps), weight, bias).to(x.dtype)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise ValueError("an instance norm that tracks running statistics is not compiled")
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = _normalised(_wide(x), tuple(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or enable_gqa:
        raise ValueError("attention with dropout or grouped queries is not compiled")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    return scores.softmax(-1) @ value


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    Tensor.view: Tensor.reshape,  # channels-last activations cannot be viewed
}
