"""What each Triton module is compiled for: a file an operator, found by its name.

Each has ``compile_cases(warp_size, hip)``: the kernels as a launch would have them, with tensors that hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class CompileCase(NamedTuple):
    name: str  # in tables
    kernel: Any
    arguments: dict[str, Any]  # more than the kernel takes may be given
    options: dict[str, Any]  # of Triton's compiler
    config: dict[str, Any]  # what the launch chose, for tables
    statistics: int = 0  # how many of the first tiles that are summed have their layouts looked at


def empty(shape: Sequence[int], scalar: str = "f32") -> Tensor:
    return torch.zeros(*shape, dtype=DTYPES[scalar], device="meta")


def wide(scalar: str) -> str:
    """What is computed in."""
    return "f64" if scalar == "f64" else "f32"
