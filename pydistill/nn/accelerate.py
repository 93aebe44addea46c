"""Swaps the operators into an existing network, parameter by parameter the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pydistill.ops import conv2d, instance_norm_relu_avg_pool


class InstanceNormReLUAvgPool(nn.Module):
    """`pydistill.instance_norm_relu_avg_pool` as a module; ``weight`` and ``bias`` are ``[C]``.

    ``contiguous`` gives the output in NCHW, whatever the layout of the input: for the last block before a ``view``.
    """

    def __init__(
        self, channels: int, eps: float = 1e-5, relu: bool = True, pool: bool = True, contiguous: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps, self.relu, self.pool, self.contiguous = eps, relu, pool, contiguous

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = instance_norm_relu_avg_pool(x, self.weight, self.bias, eps=self.eps, relu=self.relu, pool=self.pool)
        return y.contiguous() if self.contiguous else y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, relu={self.relu}, pool={self.pool}"


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` (zero padding, in numbers) on `pydistill.ops.conv2d`: the same values, a faster second derivative.

    With ``channels_last`` set, the work is done in that layout on the CPU, where oneDNN is faster in it.
    """

    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def accelerate(module: nn.Module) -> nn.Module:
    """Replace, in place, the blocks of a ConvNet by fused operators; returns ``module``.

    In every ``nn.Sequential`` found, ``GroupNorm(C, C)`` with the ``ReLU`` and ``AvgPool2d(2)`` that follow it (either
    may be missing) becomes one `InstanceNormReLUAvgPool`, and ``nn.Conv2d`` becomes `Conv2d`; a Sequential that ends in
    such a block runs in channels-last on the CPU and gives its output in NCHW. Parameters stay the same objects under
    the same ``state_dict`` keys in the same order; outputs and gradients are the same up to rounding.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: nothing to replace was found, or a module to be replaced has hooks, which would be lost.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    replaced = sum(_accelerate_sequential(m) for m in list(module.modules()) if isinstance(m, nn.Sequential))
    if not replaced:
        raise ValueError(
            "module: found no GroupNorm(C, C) in an nn.Sequential to replace; expected a ConvNet of blocks "
            "Conv2d, GroupNorm(C, C), ReLU, AvgPool2d(2)"
        )
    return module


def _accelerate_sequential(layers: nn.Sequential) -> int:
    replaced = 0
    for i, layer in enumerate(layers):
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            _refuse_hooks(layer)
            layer.__class__ = Conv2d  # same state; only forward differs
        if type(layer) is not nn.GroupNorm or layer.num_groups != layer.num_channels or not layer.affine:
            continue
        following = [layers[j] if j < len(layers) else None for j in (i + 1, i + 2)]
        relu = type(following[0]) is nn.ReLU
        pool_at = i + 1 + relu
        pool = _is_pool(following[int(relu)])
        fused = InstanceNormReLUAvgPool(layer.num_channels, layer.eps, relu, pool)
        fused.weight, fused.bias = layer.weight, layer.bias
        fused.train(layer.training)
        gone = [i, *([i + 1] if relu else []), *([pool_at] if pool else [])]
        for j in gone:
            _refuse_hooks(layers[j])
        layers[i] = fused
        for j in gone[1:]:
            layers[j] = nn.Identity()  # keeps the indices, and so the state_dict keys, of what follows
        replaced += 1
    # A stretch that begins with a convolution and ends with a fused block may choose its own layout in between.
    inner = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    if inner and isinstance(inner[0], Conv2d) and isinstance(inner[-1], InstanceNormReLUAvgPool):
        inner[0].channels_last = inner[-1].contiguous = True
    return replaced


def _is_pool(layer: nn.Module | None) -> bool:
    """A 2x2 average pool with stride 2 that neither pads nor rounds up."""
    if type(layer) is not nn.AvgPool2d or layer.ceil_mode or layer.divisor_override is not None:
        return False
    return [_both(v) for v in (layer.kernel_size, layer.stride, layer.padding)] == [(2, 2), (2, 2), (0, 0)]


def _both(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _refuse_hooks(layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError(f"module: {layer} has hooks, which replacing it would lose; remove them first")
