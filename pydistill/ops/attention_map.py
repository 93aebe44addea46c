"""Attention maps of features, from one read of them and without a copy.

Two operators, each the other's adjoint in its sums; with f the ``order``-th derivative of ``|x|^p`` times ``factor``:

    reduce     spatial = f summed over the channels, channel = f summed over the positions
    adjoint    f (spatial + channel), for every element

Differentiation raises the order and stays within the family, so the maps are differentiable to any order.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._arguments import check_choice
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._rows import batch_into_rows

BACKENDS = ("reference", "cpu", "triton")
AXES = ("spatial", "channel", "both")
Axis = Literal["spatial", "channel", "both"]


@overload
def attention_map(
    x: Tensor, p: float = ..., axis: Literal["spatial", "channel"] = ..., *, backend: str = ...
) -> Tensor: ...
@overload
def attention_map(x: Tensor, p: float = ..., *, axis: Literal["both"], backend: str = ...) -> tuple[Tensor, Tensor]: ...
@overload
def attention_map(x: Tensor, p: float, axis: Literal["both"], *, backend: str = ...) -> tuple[Tensor, Tensor]: ...
def attention_map(
    x: Tensor, p: float = 4.0, axis: Axis = "spatial", *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Sums of ``|x|^p`` over the channels (spatial attention) or over the positions (channel attention), or both.

    Equivalent to ``x.abs().pow(p).sum(1).flatten(1)`` and ``x.abs().pow(p).sum((2, 3))``. The maps that DataDAM (Sajedi
    et al., ICCV 2023) and ATOM (Khaki et al., 2024) match, before normalisation; attention transfer (Zagoruyko &
    Komodakis, ICLR 2017) has p = 2. Differentiable to any order, in reverse and forward mode, under ``torch.func`` and
    ``torch.compile``. Deterministic: equal bits across runs, thread counts and instruction sets, except that p other
    than 1, 2, 3 and 4 uses the platform's ``pow``. NaN and Inf propagate as in torch.

    Args:
        x: ``[N, C, H, W]``, float32, float64, bfloat16 or float16; copied unless contiguous or channels-last. All
            arithmetic is in float32 (float64 for float64).
        p: the power, above zero. At x = 0 derivatives are zero.
        axis: "spatial", "channel", or "both" from one read.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu" or "triton".

    Returns:
        ``[N, H * W]`` or ``[N, C]``, or both in this order; float32, also for 16-bit x, which could not hold the powers
        (float64 for float64; the reference keeps x's dtype).

    Raises:
        TypeError: x is not a tensor or has an unsupported dtype.
        ValueError: x is not ``[N, C, H, W]``, p is not above zero, or axis is unknown.
        NotImplementedError: the backend cannot run here.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {list(x.shape)}")
    check_power(p)
    check_choice("axis", axis, AXES)
    chosen = choose_backend("attention_map", backend, x.device, BACKENDS)
    if chosen == "reference":
        return reference.attention_map(x, p, axis)
    operators = _triton if chosen == "triton" else _native
    spatial, channel = operators.reduce(x, None, p, 0, axis != "channel", axis != "spatial")
    return (spatial, channel) if axis == "both" else (spatial if axis == "spatial" else channel)


def check_power(p: float) -> None:
    if not 0 < p < float("inf"):
        raise ValueError(f"p: expected a finite number above zero, got {p}")


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _reduce_fake(x: Tensor, factor: Tensor | None, p: float, order: int, spatial: bool, channel: bool) -> tuple:
    N, C, H, W = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((N, H * W if spatial else 0), dtype=dtype), x.new_empty((N, C if channel else 0), dtype=dtype)


def _adjoint_fake(
    spatial: Tensor | None, channel: Tensor | None, x: Tensor, factor: Tensor | None, p: float, order: int
) -> Tensor:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


class _Operators:
    """The two operators of one library. In every formula, `saved` are the operator's tensors."""

    def __init__(self, library: str):
        self.reduce: Operator = Operator(
            "attention_map",
            library=library,
            tensors=2,
            fake=_reduce_fake,
            vjp=self._reduce_vjp,
            jvp=self._reduce_jvp,
            vmap=batch_into_rows(lambda *args: self.reduce.raw(*args), 2),
        )
        self.adjoint: Operator = Operator(
            "attention_map_adjoint",
            library=library,
            tensors=4,
            fake=_adjoint_fake,
            vjp=self._adjoint_vjp,
            jvp=self._adjoint_jvp,
            vmap=batch_into_rows(lambda *args: self.adjoint.raw(*args), 4),
        )

    def _reduce_vjp(self, saved: tuple, options: tuple, grad_spatial: Tensor, grad_channel: Tensor) -> tuple:
        (x, factor), (p, order, spatial, channel) = saved, options
        grads = (grad_spatial if spatial else None, grad_channel if channel else None)
        grad_x = self.adjoint(*grads, x, factor, p, order + 1)
        return grad_x, None if factor is None else self.adjoint(*grads, x, None, p, order)

    def _reduce_jvp(self, saved: tuple, options: tuple, x_t: Tensor, factor_t: Tensor | None) -> tuple:
        (x, factor), (p, order, *wanted) = saved, options
        maps_t = self.reduce(x, _product(x_t, factor), p, order + 1, *wanted)
        if factor is not None:
            moved = self.reduce(x, factor_t, p, order, *wanted)
            maps_t = tuple(a + b for a, b in zip(maps_t, moved, strict=True))
        return maps_t

    def _adjoint_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        (spatial, channel, x, factor), (p, order) = saved, options
        weight = _product(grad, factor)
        maps = self.reduce(x, weight, p, order, spatial is not None, channel is not None)
        grads = [None if given is None else found for given, found in zip((spatial, channel), maps, strict=True)]
        grad_x = self.adjoint(spatial, channel, x, weight, p, order + 1)
        grad_factor = None
        if factor is not None:
            grad_factor = self.adjoint(spatial, channel, x, grad, p, order)
        return *grads, grad_x, grad_factor

    def _adjoint_jvp(
        self,
        saved: tuple,
        options: tuple,
        spatial_t: Tensor | None,
        channel_t: Tensor | None,
        x_t: Tensor,
        factor_t: Tensor | None,
    ) -> Tensor:
        (spatial, channel, x, factor), (p, order) = saved, options
        out_t = self.adjoint(spatial_t, channel_t, x, factor, p, order)
        out_t = out_t + self.adjoint(spatial, channel, x, _product(x_t, factor), p, order + 1)
        if factor is not None:
            out_t = out_t + self.adjoint(spatial, channel, x, factor_t, p, order)
        return out_t


def _product(direction: Tensor, factor: Tensor | None) -> Tensor:
    return direction if factor is None else direction * factor


def _fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import attention_map as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "attention_map", _reduce_fake, _fill("reduce"))
register_filled(_triton_library, "attention_map_adjoint", _adjoint_fake, _fill("adjoint"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
FORMS = (_native.reduce, _native.adjoint)
