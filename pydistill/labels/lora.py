"""Low-rank factors beside frozen weights ("LoRA", Hu et al., ICLR 2022), for one teacher or several at once."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._arguments import check_choice

__all__ = ["LoRAConv", "LoRALinear", "add_lora", "lora_logits"]


def lora_logits(
    x: Tensor, W: Tensor, A: Tensor, Bm: Tensor, scale: float = 1.0, *, reduction: Literal["none", "mean"] = "none"
) -> Tensor:
    """Logits of M teachers that share the frozen head ``W``, each with its own low-rank change of it.

    Equivalent to ``torch.stack([x @ (W + scale * B @ a).T for a, B in zip(A, Bm)])``, and of that ``.mean(0)`` with
    ``reduction="mean"``, without the M changed heads: ``x @ W.T`` is computed once, and all factors ``A`` are one
    matrix product. The mean is that of a single teacher of rank M r, so ``[M, B, C]`` is not written either. HeLlO (Yu
    et al., ICCV 2025) labels this way. Differentiable to any order by torch.

    Args:
        x: ``[B, d]`` features.
        W: ``[C, d]`` frozen head.
        A: ``[M, r, d]``, a factor per teacher; or ``[r, d]`` for a single teacher.
        Bm: ``[M, C, r]``, or ``[C, r]``.
        scale: of the change.
        reduction: "none", or the "mean" over teachers.

    Returns:
        ``[M, B, C]``, or ``[B, C]`` for a single teacher or a mean; the dtype of x.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, device or option does not fit.
    """
    _check(x, W, A, Bm, scale, reduction)
    base = x @ W.T  # [B, C]
    if A.dim() == 2:
        return torch.addmm(base, x @ A.T, Bm.T, alpha=scale)
    M, r, _ = A.shape
    low = x @ A.flatten(0, 1).T  # [B, M r]
    if reduction == "mean":
        return torch.addmm(base, low, Bm.permute(0, 2, 1).flatten(0, 1), alpha=scale / M)
    low = low.unflatten(1, (M, r)).transpose(0, 1)  # [M, B, r]
    return torch.baddbmm(base.expand(M, -1, -1), low, Bm.mT, alpha=scale)


def _check(x: Tensor, W: Tensor, A: Tensor, Bm: Tensor, scale: float, reduction: str) -> None:
    for name, tensor in (("x", x), ("W", W), ("A", A), ("Bm", Bm)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} as x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")
    if x.dim() != 2:
        raise ValueError(f"x: expected [B, d], got {list(x.shape)}")
    d = x.shape[1]
    if W.dim() != 2 or W.shape[1] != d:
        raise ValueError(f"W: expected [C, {d}], got {list(W.shape)}")
    if A.dim() not in (2, 3) or A.shape[-1] != d:
        raise ValueError(f"A: expected [M, r, {d}] or [r, {d}], got {list(A.shape)}")
    wanted = [*A.shape[:-2], len(W), A.shape[-2]]
    if list(Bm.shape) != wanted:
        raise ValueError(f"Bm: expected {wanted}, got {list(Bm.shape)}")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    check_choice("reduction", reduction, ("none", "mean"))


class LoRALinear(nn.Module):
    """``base(x) + scale * x A^T B^T``: a frozen linear layer and factors A ``[r, in]``, B ``[out, r]``; B starts at 0.

    Args:
        base: the layer, which is frozen in place.
        rank: r; more than the smaller side of the weight is of no use.
        scale: of the change.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0):
        super().__init__()
        _check_rank(rank)
        self.base, self.scale = base.requires_grad_(False), scale
        dtype, device = base.weight.dtype, base.weight.device
        self.A = nn.Parameter(
            torch.randn(rank, base.in_features, dtype=dtype, device="cpu").to(device) / base.in_features**0.5
        )
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @property
    def weight(self) -> Tensor:
        """The changed weight, for modules such as ``nn.MultiheadAttention`` that read it and bypass ``forward``."""
        return self.base.weight + self.scale * self.B @ self.A

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class LoRAConv(nn.Module):
    """``base(x) + scale * conv(conv(x, A), B)``: A has the base's kernel and r outputs, B is 1x1 and starts at 0.

    Args:
        base: a convolution with one group, which is frozen in place.
        rank: r.
        scale: of the change.

    Raises:
        ValueError: a rank below 1, or a grouped convolution.
    """

    def __init__(self, base: nn.Conv2d, rank: int, scale: float = 1.0):
        super().__init__()
        _check_rank(rank)
        if base.groups != 1 or base.padding_mode != "zeros":
            got = f"{base.groups} groups, padding_mode {base.padding_mode!r}"
            raise ValueError(f"base: expected a convolution in one group that pads by zeros, got {got}")
        self.base, self.scale = base.requires_grad_(False), scale
        dtype, device = base.weight.dtype, base.weight.device
        inputs = base.weight[0].numel()
        self.A = nn.Parameter(
            torch.randn(rank, *base.weight.shape[1:], dtype=dtype, device="cpu").to(device) / inputs**0.5
        )
        self.B = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.conv2d(x, self.A, None, self.base.stride, self.base.padding, self.base.dilation)
        return self.base(x) + self.scale * F.conv2d(low, self.B)


def add_lora(encoder: nn.Module, rank: int, scale: float = 1.0) -> nn.Module:
    """A frozen copy of ``encoder``, in evaluation mode, with trainable factors beside linear layers and convolutions.

    Depthwise and grouped convolutions stay as they are, and so does the input projection of ``nn.MultiheadAttention``,
    which is a parameter, not a layer.

    Raises:
        ValueError: a rank below 1, or no layer that can take factors.
    """
    found = copy.deepcopy(encoder).requires_grad_(False).eval()
    if not _replace(found, rank, scale):
        raise ValueError(f"encoder: expected a linear layer or a convolution inside, got {type(encoder).__name__}")
    return found


def _replace(module: nn.Module, rank: int, scale: float) -> int:
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LoRALinear(child, rank, scale))
        elif isinstance(child, nn.Conv2d) and child.groups == 1 and child.padding_mode == "zeros":
            setattr(module, name, LoRAConv(child, rank, scale))
        else:
            count += _replace(child, rank, scale)
            continue
        count += 1
    return count


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}")
