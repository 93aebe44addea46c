"""Shared by operators on independent rows, samples or vectors: vmap, kept gradients, autocast, class numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def batch_into_rows(op: Callable[..., Any], tensors: int) -> Any:
    """The vmap rule: the first dimension is of independent rows, so a batch dimension becomes more rows."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        B = info.batch_size
        folded = []
        for arg, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
            if arg is not None:
                arg = arg.unsqueeze(0).expand(B, *arg.shape) if dim is None else arg.movedim(dim, 0)
                arg = arg.reshape(B * arg.shape[1], *arg.shape[2:])
            folded.append(arg)
        out = op(*folded, *args[tensors:])
        if isinstance(out, Tensor):
            return out.unflatten(0, (B, out.shape[0] // B)), 0
        # not -1: an output may have no elements
        return tuple(o.unflatten(0, (B, o.shape[0] // B)) for o in out), tuple(0 for _ in out)

    return rule


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of a row's arithmetic and of its loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where a tensor is: losses are float32 there, as torch's own are."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def widened(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss in plain torch that under autocast computes in float32, as the kernels do and torch's losses."""

    def wide(value: Any) -> Any:
        halved = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if halved else value

    def run(first: Tensor, *args: Any, **options: Any) -> Tensor:
        if not under_autocast(first):
            return reference(first, *args, **options)
        with torch.autocast(first.device.type, enabled=False):
            return reference(*map(wide, (first, *args)), **{name: wide(value) for name, value in options.items()})

    return run


def scale_kept(ctx: Any, kept: Tensor, grad: Tensor) -> Tensor | None:
    """The rows' gradients ``kept`` beside their losses, times ``grad`` [N]; None if they have to be recomputed.

    That is the case if a second derivative may follow, which ``kept`` cannot give, and in a second backward pass
    through one graph, as the first one scales them in place.
    """
    if torch.is_grad_enabled() or getattr(ctx, "spent", False):
        return None
    factor = grad.unsqueeze(1)
    if ctx.owns_kept and type(grad) is Tensor:
        try:
            # for a sum, no row needs scaling
            alike = grad.device.type == "cpu" and grad.stride() == (0,) and len(grad) > 0
            scaled = kept.data if alike and float(grad[0]) == 1 else kept.data.mul_(factor)
            ctx.spent = True
            return scaled
        except RuntimeError:  # under vmap, which cannot write many gradients in place of one
            pass
    return (kept * factor).to(kept.dtype)


def check_floating(name: str, tensor: Any) -> None:
    """Raises ``TypeError`` unless ``tensor`` is one of the four floating types."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_class_numbers(name: str, numbers: Tensor, C: int, note: str = "") -> None:
    """Raises ``ValueError`` for one not in 0..C-1, where values are visible: on the CPU, in eager mode."""
    if numbers.device.type != "cpu" or torch.compiler.is_compiling() or numbers.numel() == 0:
        return
    try:
        low, high = (int(v) for v in numbers.aminmax())
    except RuntimeError:  # the values of fake tensors and those under vmap are not accessible
        return
    if low < 0 or high >= C:
        raise ValueError(
            f"{name}: expected class numbers in 0..{C - 1} for {C} classes, got {low if low < 0 else high}{note}"
        )
