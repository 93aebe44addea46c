"""Max pooling in channels-last memory, with one byte per output for the backward pass: torch's indices take as much
memory as the bfloat16 input of a ResNet's stem pooling, and its gradient is zero-filled before anything is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend
from pydistill.ops._rows import batch_into_rows

BACKENDS = ("reference", "cpu")

MAX_KERNEL = 15  # a byte numbers the elements of a window


def max_pool2d(x: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1, *, backend: str = "auto") -> Tensor:
    """Equivalent to ``F.max_pool2d(x, kernel_size, stride, padding)``, by default a ResNet's pooling.

    Of equal elements the first in its window wins, and NaN wins over all numbers, as in torch. Differentiable to any
    order: linear in x for given winners, in the forward and the backward pass.

    Args:
        x: ``[N, C, H, W]``, C >= 1 and H, W >= max(1, kernel_size - 2 padding); float32, float64, bfloat16 or float16,
            any strides; channels-last is read as it is, other layouts are copied first.
        kernel_size: side of the windows, 1 to 15.
        stride: from one window to the next, at least 1.
        padding: positions around x that windows may cover and that never win; 0 to half of ``kernel_size``.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device) or "cpu".

    Returns:
        ``[N, C, floor((H + 2 padding - kernel_size) / stride) + 1, ...]`` in the dtype of x and, whatever its layout,
        in channels-last memory ("reference": in that of x). Equal to torch's in every bit. A gradient's terms are
        summed in float32 (float64 for float64) and rounded once; equal bits across thread counts and instruction sets.

    Raises:
        TypeError: x is not a tensor or of another dtype, or a size is not an int.
        ValueError: x does not have four dimensions, or a size is out of range.
        NotImplementedError: the backend cannot run here.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    check_pooling(x, kernel_size, stride, padding)
    if choose_backend("max_pool2d", backend, x.device, BACKENDS) == "reference":
        return reference.max_pool2d(x, kernel_size, stride, padding)
    return _forward(x, kernel_size, stride, padding)[0]


def check_pooling(x: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    """Raise unless these sizes can pool x, whose dtype is supported."""
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {value!r}")
    if not 1 <= kernel_size <= MAX_KERNEL:
        raise ValueError(f"kernel_size: expected 1 to {MAX_KERNEL}, got {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if not 0 <= 2 * padding <= kernel_size:
        raise ValueError(f"padding: expected 0 to {kernel_size // 2}, half of kernel_size, got {padding}")
    least = max(1, kernel_size - 2 * padding)
    if x.dim() != 4 or x.shape[1] == 0 or min(x.shape[2:]) < least:
        raise ValueError(f"x: expected [N, C, H, W] with C >= 1 and H, W >= {least}, got shape {list(x.shape)}")


# In every formula below: `saved` are the operator's tensors, `options` its other arguments, the last three of which are
# (kernel, stride, padding).


def empty_images(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def pooled_shape(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    return (*x.shape[:2], *((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]))


def _forward_fake(x: Tensor, *options: int) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(x, *options)
    return empty_images(shape, x, x.dtype), empty_images(shape, x, torch.uint8)


def _gather_fake(x: Tensor, which: Tensor, *options: int) -> Tensor:
    return empty_images(pooled_shape(x, *options), x, x.dtype)


def _backward_fake(grad: Tensor, which: Tensor, height: int, width: int, *options: int) -> Tensor:
    return empty_images((*grad.shape[:2], height, width), grad, grad.dtype)


def _forward_vjp(saved: tuple, options: tuple, ctx: Any, grad: Tensor | None, _: Any) -> tuple:
    x, which = saved
    return (None if grad is None else scatter(grad, which, *x.shape[2:], *options),)


def _forward_jvp(saved: tuple, options: tuple, x_t: Tensor, *rest: Any) -> tuple:
    x = saved[0]  # forward mode has no kept outputs
    return gather(x_t, _forward(x, *options)[1], *options), None


_forward: Operator = Operator(
    "max_pool2d",
    tensors=1,
    fake=_forward_fake,
    vjp=_forward_vjp,
    jvp=_forward_jvp,
    vmap=batch_into_rows(lambda *args: _forward.raw(*args), 1),
    kept=1,
)
gather: Operator = Operator(
    "max_pool2d_gather",
    tensors=2,
    fake=_gather_fake,
    vjp=lambda saved, options, grad: (scatter(grad, saved[1], *saved[0].shape[2:], *options), None),
    jvp=lambda saved, options, x_t, *rest: gather(x_t, saved[1], *options),
    vmap=batch_into_rows(lambda *args: gather.raw(*args), 2),
)
scatter: Operator = Operator(
    "max_pool2d_backward",
    tensors=2,
    fake=_backward_fake,
    vjp=lambda saved, options, grad: (gather(grad, saved[1], *options[2:]), None),
    jvp=lambda saved, options, grad_t, *rest: scatter(grad_t, saved[1], *options),
    vmap=batch_into_rows(lambda *args: scatter.raw(*args), 2),
)
