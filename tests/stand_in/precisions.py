"""Torch's switches for what factors of float32 products are rounded to, and what was computed under which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# of convolutions and of matrix products
IEEE, TF32, CONV, MATMUL = (("ieee", "ieee"), ("tf32", "tf32"), ("tf32", "ieee"), ("ieee", "tf32"))

CONVOLUTIONS: Any = torch.backends.cudnn.conv
PRODUCTS: Any = torch.backends.cuda.matmul


class Precisions(TorchDispatchMode):
    """What convolutions and matrix products are asked to round their factors to, where they are not replayed."""

    OPERATORS = ("convolution", "convolution_backward", "addmm", "mm", "bmm", "baddbmm")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()
        self.replays, replay = False, torch.cuda.CUDAGraph.replay

        def replayed(graph: Any) -> None:  # by a graph, which has the roundings of its capture
            self.replays = True
            replay(graph)
            self.replays = False

        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in self.OPERATORS and not self.replays:
            self.seen.add(roundings())
        return function(*args, **(kwargs or {}))


def roundings() -> tuple[str, str]:
    return CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision


@contextlib.contextmanager
def switched_to(convolutions: str, products: str) -> Iterator[None]:
    before = roundings()
    CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision = convolutions, products
    try:
        yield
        assert roundings() == (convolutions, products)  # nothing else has changed them
    finally:
        CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision = before
