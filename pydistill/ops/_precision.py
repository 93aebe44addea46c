"""In what precision students compute: the names, what "auto" means when it is asked for, and torch's switches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast, get_args

import torch

Precision = Literal["auto", "ieee", "bf16", "tf32", "tf32-conv", "tf32-matmul", "fp32"]
Resolved = Literal["ieee", "bf16", "tf32", "tf32-conv", "tf32-matmul"]

# what factors of float32 products are rounded to on a CUDA device: those of convolutions, those of matrices
_ROUNDINGS: dict[Resolved, tuple[str, str]] = {
    "ieee": ("ieee", "ieee"),
    "bf16": ("ieee", "ieee"),  # what is not bfloat16
    "tf32": ("tf32", "tf32"),
    "tf32-conv": ("tf32", "ieee"),
    "tf32-matmul": ("ieee", "tf32"),
}

_NAMES, _RESOLVED = get_args(Precision), get_args(Resolved)

# their attributes are made at run time
_CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_PRODUCTS: Any = torch.backends.cuda.matmul

switching = threading.RLock()  # torch's switches are the process's


def check_name(precision: str, *more: str) -> None:
    """ValueError for a precision that there is not; ``more``: names that a caller has besides."""
    if precision not in (*_NAMES, *more):
        *most, last = map(repr, (*_RESOLVED, *more))
        raise ValueError(f"precision: expected 'auto', {', '.join(most)} or {last}, got {precision!r}")


def check_device(precision: str, device: torch.device) -> None:
    """ValueError for TF32 and float16 on another device than CUDA's."""
    if precision.startswith(("tf32", "fp16")) and device.type != "cuda":
        raise ValueError(f"precision: expected 'ieee' or 'bf16' on {device.type}, got {precision!r}")


def named(precision: str, dtype: torch.dtype) -> Precision:
    """The precision by its present name: "fp32" is the former one of "ieee".

    Raises:
        ValueError: there is none of that name.
        TypeError: it is not one of tensors of this dtype.
    """
    check_name(precision)
    name = "ieee" if precision == "fp32" else cast(Precision, precision)
    if name not in ("auto", "ieee") and dtype != torch.float32:
        raise TypeError(f"precision: expected float32 images and parameters for {name!r}, got {dtype}")
    return name


def resolved(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Resolved:
    """The same, with "auto" as torch's switches are now; `named`'s errors, and ValueError for TF32 on another device
    than CUDA's."""
    name = named(precision, dtype)
    if name == "auto":
        return _switched_to(device) if dtype == torch.float32 else "ieee"
    check_device(name, device)
    return cast(Resolved, name)


def rounds_convolutions(precision: Resolved) -> bool:
    """Whether convolutions run on a GPU's tensor cores."""
    return precision == "bf16" or _ROUNDINGS[precision][0] == "tf32"


def check_switches(precision: Resolved, device: torch.device, dtype: torch.dtype, why: str) -> None:
    """ValueError unless torch's switches are as ``precision`` says; ``why`` this has to be."""
    if device.type != "cuda" or dtype != torch.float32 or precision == "bf16":
        return
    if precision != (now := _switched_to(device)):
        raise ValueError(f"precision: expected {now!r}, as torch.backends is set, {why}, got {precision!r}")


@contextlib.contextmanager
def rounded(precision: Resolved, device: torch.device) -> Iterator[None]:
    """Sets torch's switches of a CUDA device's float32 products; afterwards they are as before.

    They are the process's: where threads compute in several precisions, this is to be done with `switching` held. Not
    around a backward pass, whose thread may wait for that."""
    roundings = zip((_CONVOLUTIONS, _PRODUCTS), _ROUNDINGS[precision], strict=True)
    with switched(roundings if device.type == "cuda" else ()):
        yield


@contextlib.contextmanager
def switched(roundings: Iterable[tuple[Any, str]]) -> Iterator[None]:
    """Sets each of torch's switches to what is beside it; afterwards they are as before."""
    before = []
    try:
        for switch, rounding in roundings:
            if (now := switch.fp32_precision) != rounding:
                before.append((switch, now))
                switch.fp32_precision = rounding
        yield
    finally:
        for switch, then in before:
            switch.fp32_precision = then


def _switched_to(device: torch.device) -> Resolved:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):  # which do not have TF32
        return "ieee"
    with switching:
        roundings = tuple("tf32" if s.fp32_precision == "tf32" else "ieee" for s in (_CONVOLUTIONS, _PRODUCTS))
    return next(name for name, each in _ROUNDINGS.items() if each == roundings)
