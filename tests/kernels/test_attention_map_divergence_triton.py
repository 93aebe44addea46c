"""The Triton kernels of attention_map_divergence: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

import pytest
import torch
from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts

from pydistill import _library, info
from pydistill.ops import attention_map_divergence


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("attention_map_divergence", part)


@needs_triton
@architectures
def test_every_kernel_compiles_and_spills_a_few_words_at_most(archs: tuple[str, ...]) -> None:
    registers = {"registers": 64 * 1024, "amd_registers": 128 * 1024}
    compiled = check_compiled("attention_map_divergence", 18, archs, shared=64 * 1024, spills=64, **registers)
    for name in ("rows", "grad_q", "grad_k"):
        assert any(kernel.kernel == f"attention_map_divergence::triton_{name}<f32, fkl, 64>" for kernel in compiled)


def test_named_but_unable() -> None:
    assert not _library.triton_is_interpreted
    q = torch.randn(2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run on cpu tensors.*TRITON_INTERPRET=1"):
        attention_map_divergence(q, q, q, q, backend="triton")
    with pytest.raises(NotImplementedError, match="attention_map_divergence has no cuda kernel; it has reference, cpu"):
        attention_map_divergence(q, q, q, q, backend="cuda")


def test_info_knows_its_backends() -> None:
    table = info.backends()["attention_map_divergence"]
    assert table["reference"] == table["cpu"] == "available"
    assert table["cuda"] == "no such kernel"
