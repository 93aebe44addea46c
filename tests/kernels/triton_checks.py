"""What every Triton kernel has to pass: right in the interpreter, and compiled for every GPU.

Interpreter and compiler exclude one another within a process, so each gets one of its own.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from bench import triton_kernels
from bench.triton_kernels import TARGETS, Compiled

needs_triton = pytest.mark.skipif(
    platform.system() != "Linux" and importlib.util.find_spec("triton") is None,
    reason="Triton has no release for this system",  # on Linux the test extra brings it
)


parts = pytest.mark.parametrize("part", ["sample", pytest.param("rest", marks=pytest.mark.exhaustive)])
architectures = pytest.mark.parametrize(
    "archs",
    [("sm_90",), pytest.param(tuple(arch for arch in TARGETS if arch != "sm_90"), marks=pytest.mark.exhaustive)],
    ids=["sm_90", "others"],
)


def check_in_the_interpreter(operator: str, part: str) -> None:
    """The tests of ``interpreted_OPERATOR.py`` pass: every seventh of them, or the rest."""
    file = Path(__file__).with_name(f"interpreted_{operator}.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYDISTILL_INTERPRETED": part}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def _spills_are_bounded() -> bool:
    """Each Triton brings its own ptxas: the bounds are what 3.9's keeps. 3.6's spills a few words more."""
    return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 9)


def check_compiled(
    operator: str,
    count: int,
    archs: Sequence[str],
    *,
    shared: int,
    registers: int = 32 * 1024,
    amd_registers: int = 32 * 1024,
    spills: int = 0,
) -> list[Compiled]:
    """Each of the ``count`` kernels compiles for these GPUs, within what a block may have of registers (by default half
    of NVIDIA's 64 Ki a multiprocessor, a quarter of AMD's 128 Ki a SIMD) and of bytes that are shared or spilt."""
    compiled = triton_kernels.compiled(operator, archs)
    names = {kernel.kernel for kernel in compiled}
    assert len(names) == count
    for arch in archs:
        assert sorted(kernel.kernel for kernel in compiled if kernel.arch == arch) == sorted(names)
    for kernel in compiled:
        if _spills_are_bounded():
            assert max(kernel.spill_stores, kernel.spill_loads) <= spills, kernel
        threads = kernel.config["num_warps"] * TARGETS[kernel.arch][2]
        available = registers if kernel.arch.startswith("sm") else amd_registers
        assert 0 < kernel.registers * threads <= available, kernel
        assert kernel.shared <= shared, kernel
    return compiled
