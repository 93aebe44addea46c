"""The Triton kernels of attention_map_divergence: right in the interpreter, compiled for every GPU, reached by name.

Interpreter and compiler exclude each other within a process, so each gets its own.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import triton_kernels
from bench.triton_kernels import TARGETS
from pydistill import _library, info
from pydistill.ops import attention_map_divergence

needs_triton = pytest.mark.skipif(
    platform.system() != "Linux" and importlib.util.find_spec("triton") is None,
    reason="Triton has no release for this system",  # on Linux the test extra brings it
)


@needs_triton
def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_attention_map_divergence.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_compiles_and_spills_a_few_words_at_most(arch: str) -> None:
    compiled = triton_kernels.compiled_attention([arch])
    names = {kernel.kernel for kernel in compiled}
    assert len(names) == len(compiled) == 3 * len(triton_kernels.ATTENTION_CASES)
    for name in triton_kernels.ATTENTION_PASSES:
        assert f"attention_map_divergence::triton_{name}<f32, fkl, 64>" in names
    for kernel in compiled:
        assert max(kernel.spill_stores, kernel.spill_loads) <= 64, kernel
        # 64 Ki registers on NVIDIA's multiprocessors; a quarter of 128 Ki on each of AMD's four SIMDs
        available = (64 if arch.startswith("sm") else 128) * 1024
        threads = kernel.config["num_warps"] * TARGETS[kernel.arch][2]
        assert 0 < kernel.registers * threads <= available, kernel
        assert kernel.shared <= 64 * 1024, kernel


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
