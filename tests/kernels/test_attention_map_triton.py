"""The Triton kernels of attention_map: right in the interpreter, compiled for every GPU.

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

from bench import triton_kernels
from bench.triton_kernels import MAP_CASES, TARGETS, map_name

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" and importlib.util.find_spec("triton") is None,
    reason="Triton has no release for this system",  # on Linux the test extra brings it
)


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_attention_map.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_both_kernels_compile_for_every_gpu_without_spills() -> None:
    compiled = triton_kernels.compiled_maps()
    for arch in TARGETS:
        assert {kernel.kernel for kernel in compiled if kernel.arch == arch} == {map_name(*case) for case in MAP_CASES}
    for kernel in compiled:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        threads = kernel.config["num_warps"] * TARGETS[kernel.arch][2]
        assert 0 < kernel.registers * threads <= 32 * 1024, kernel  # at least two blocks a multiprocessor
        assert kernel.shared <= 32 * 1024, kernel
