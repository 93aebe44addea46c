"""The Triton kernels of attention_map in Triton's interpreter, against plain torch.

Not collected by itself: `test_attention_map_triton.py` runs this file in a process of its own, because the interpreter
has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops import attention_map
from pydistill.testing import CHECKS, Case, check_op
from pydistill.triton import attention_map as kernels


def ours(x: Tensor, p: float, axis: str) -> Tensor:
    maps = attention_map(x, p, axis, backend="triton")
    return torch.cat(maps if isinstance(maps, tuple) else [maps], 1).to(x.dtype)


def plain(x: Tensor, p: float, axis: str) -> Tensor:
    maps = reference.attention_map(x, p, axis)
    return torch.cat(maps if isinstance(maps, tuple) else [maps], 1).to(x.dtype)


def feature_map(*shape: int, layout: str = "dense"):
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
        x = (x + 0.2 * x.sign()).to(dtype)
        return (x.to(memory_format=torch.channels_last) if layout == "channels_last" else x,)

    return make


# blocks of 128 positions or channels, rows of 8
CASES = [
    Case("one", feature_map(1, 1, 1, 1), {"p": 4.0, "axis": "both"}),
    Case("small", feature_map(2, 5, 3, 4), {"p": 4.0, "axis": "both"}),
    Case("blocks", feature_map(1, 17, 16, 17), {"p": 2.0, "axis": "spatial"}),
    Case("many channels", feature_map(1, 257, 2, 3), {"p": 2.0, "axis": "channel"}),
    Case("channels last", feature_map(2, 18, 3, 5, layout="channels_last"), {"p": 4.0, "axis": "both"}),
    Case("p=1", feature_map(2, 3, 4, 4), {"p": 1.0, "axis": "both"}),
    Case("p=2.5", feature_map(2, 3, 4, 4), {"p": 2.5, "axis": "both"}),
    Case("no samples", feature_map(0, 3, 4, 4), {"p": 2.0, "axis": "both"}),
]


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("repeats", "opcheck")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix(case: Case, check: str) -> None:
    check_op(ours, plain, [case], checks=[check])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_written_outside(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 5, 3, 7).to(dtype)

    def guarded(shape: tuple[int, ...], kind: torch.dtype) -> tuple[Tensor, Tensor]:
        size = torch.Size(shape).numel()
        memory = torch.full((size + 1024,), 7.0, dtype=kind)
        return memory, memory[512 : 512 + size].view(shape)

    cells = [guarded((2, 21), compute), guarded((2, 5), compute), guarded((2, 5, 3, 7), dtype)]
    kernels.reduce((cells[0][1], cells[1][1]), x, None, 3.0, 0, True, True)
    kernels.adjoint(cells[2][1], cells[0][1], cells[1][1], x, None, 3.0, 1)
    for memory, inside in cells:
        assert (memory[:512] == 7).all()
        assert (memory[512 + inside.numel() :] == 7).all()
        assert not (inside == 7).any()
