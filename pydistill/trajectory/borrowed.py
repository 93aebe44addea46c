"""Borrowing a caller's network: its mode and buffers are restored when the block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["own_buffers", "training_mode"]


@contextlib.contextmanager
def training_mode(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    net.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def own_buffers(net: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Undoes changes to the buffers at the end; yields a function that copies them as they are now."""

    def now() -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in net.named_buffers()}

    before = now()
    try:
        yield now
    finally:
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(before[name])
