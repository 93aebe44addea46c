"""Between the host and a device, without making the host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor.to(device)``; from the CPU to a GPU through pinned memory, for which the host does not wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda" and not torch.compiler.is_compiling():
        if tensor.is_pinned():
            tensor = tensor.clone()  # its owner may change it before the copy has run
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # strides would take a further copy
    return tensor.to(device)


def once(function: Callable[[Tensor], Value], tensor: Tensor) -> Value:
    """``function(tensor)``, which has to read the tensor: of one on a device again only when it was changed.

    Changes that torch counts no version for (by ``tensor.data``, or within a graph's replay) are not seen.
    """
    if tensor.device.type == "cpu" or tensor.is_inference():
        return function(tensor)
    values: dict[Any, tuple[int, Value]] = _known.setdefault(tensor, {})
    found = values.get(function)
    if found is None or found[0] != tensor._version:
        found = values[function] = (tensor._version, function(tensor))
    return found[1]


def read(*scalars: Tensor) -> list[float]:
    """The values of some scalars on one device, for which the host waits once."""
    return torch.stack([scalar.detach().reshape(()) for scalar in scalars]).tolist()
