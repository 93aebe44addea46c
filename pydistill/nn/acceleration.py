"""Swaps the operators into an existing network, keeping its parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pydistill.nn import _what_runs as what_runs
from pydistill.ops.conv2d import conv2d
from pydistill.ops.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool


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
    """``nn.Conv2d`` (numeric zero padding) on `pydistill.ops.conv2d`: the same values, a faster second derivative.

    With ``channels_last`` set, it runs in that layout on the CPU, where oneDNN is faster with it.
    """

    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        padding = cast(tuple[int, ...], self.padding)  # no string: `accelerate` leaves such layers alone
        return conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


def accelerate(module: nn.Module) -> nn.Module:
    """Replace, in place, the blocks of a ConvNet by fused operators; returns ``module``.

    In every ``nn.Sequential`` found, ``GroupNorm(C, C)`` with the ``ReLU`` and ``AvgPool2d(2)`` that follow it (either
    may be missing) becomes one `InstanceNormReLUAvgPool`, and ``nn.Conv2d`` becomes `Conv2d`; a Sequential that ends in
    such a block runs in channels-last on the CPU and gives its output in NCHW. Parameters stay the same objects under
    the same ``state_dict`` keys in the same order; outputs and gradients are the same up to rounding.

    What has the operators already stays as it is: networks that went through here before, and `pydistill.nn.ConvNet`
    with instance norm, which makes itself of them.

    Left alone are layers and Sequentials that are no longer torch's own (subclasses with another forward, methods set
    on an instance, compiled ones), and Sequentials that a method of ``module`` or of its parts takes apart (loops over,
    indexes), since it would see different values between the layers. So would code outside ``module`` that does that:
    call the Sequentials as wholes.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
        ValueError: nothing to replace was found, or a module to be replaced has hooks, which would be lost; ``module``
            is then unchanged.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    apart = what_runs.taken_apart(module)
    stretches, left = [], []
    for name, layers in module.named_modules():
        if not isinstance(layers, nn.Sequential):
            continue
        leaf = name.rpartition(".")[2]
        if not what_runs.is_sequential(layers):
            left.append(f"{name or type(layers).__name__} is no plain nn.Sequential")
        elif leaf in apart:
            left.append(f"{name} is taken apart by {apart[leaf]}")
        else:
            stretches.append((layers, _blocks(layers)))
    if not any(blocks for _, blocks in stretches):
        if any(isinstance(layer, InstanceNormReLUAvgPool) for layer in module.modules()):
            return module
        norms = dict.fromkeys(repr(layer) for layer in module.modules() if "Norm" in type(layer).__name__)
        more = [f"its norms are {', '.join(norms)}" if norms else "it has no norms", *left]
        raise ValueError(
            "module: found no GroupNorm(C, C) in an nn.Sequential to replace; expected a ConvNet of blocks "
            f"Conv2d, GroupNorm(C, C), ReLU, AvgPool2d(2); {'; '.join(more)}"
        )
    for layers, blocks in stretches:
        _replace(layers, blocks)
    return module


def _blocks(layers: nn.Sequential) -> list[tuple[int, bool, bool]]:
    """For every block, the index of its norm and whether a ReLU and a pool follow. Changes nothing."""
    blocks = []
    for i, norm in enumerate(layers):
        if not _is_instance_norm(norm):
            continue
        following = [*list(layers)[i + 1 : i + 3], None, None]
        relu = following[0] is not None and what_runs.why_not_plain(following[0], nn.ReLU) is None
        pool = _is_pool(following[int(relu)])
        for layer in list(layers)[i : i + 1 + relu + pool]:
            if what_runs.has_hooks(layer):
                raise ValueError(f"module: {layer} has hooks, which replacing it would lose; remove them first")
        blocks.append((i, relu, pool))
    return blocks


def _replace(layers: nn.Sequential, blocks: list[tuple[int, bool, bool]]) -> None:
    for i, relu, pool in blocks:
        norm = cast(nn.GroupNorm, layers[i])
        fused = InstanceNormReLUAvgPool(norm.num_channels, norm.eps, relu, pool)
        fused.weight, fused.bias = norm.weight, norm.bias
        fused.train(norm.training)
        layers[i] = fused
        for j in range(i + 1, i + 1 + relu + pool):
            layers[j] = nn.Identity()  # keeps the indices, and so the state_dict keys, of what follows
    for layer in layers:
        plain = what_runs.why_not_plain(layer, nn.Conv2d) is None
        if plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.__class__ = Conv2d  # same state; only forward differs
    # A run of layers that begins with a convolution and ends with a fused block may choose its own layout in between.
    inner = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    if inner and isinstance(inner[0], Conv2d) and isinstance(inner[-1], InstanceNormReLUAvgPool):
        inner[0].channels_last = inner[-1].contiguous = True


def _is_instance_norm(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.GroupNorm) or what_runs.why_not_plain(layer, nn.GroupNorm) is not None:
        return False
    return layer.num_groups == layer.num_channels and layer.affine


def _is_pool(layer: nn.Module | None) -> bool:
    """A 2x2 average pool with stride 2 that neither pads nor rounds up."""
    if layer is None or what_runs.why_not_plain(layer, nn.AvgPool2d) is not None:
        return False
    if layer.ceil_mode or layer.divisor_override is not None:
        return False
    return [_both(v) for v in (layer.kernel_size, layer.stride, layer.padding)] == [(2, 2), (2, 2), (0, 0)]


def _both(value: int | tuple[int, int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
