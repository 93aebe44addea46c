"""The Triton kernel of row_products: right in the interpreter, compiled for every GPU, and what GPUs choose.

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
from bench.triton_kernels import ROW_CASES, TARGETS
from pydistill import _library
from pydistill.ops import _operator
from pydistill.ops.row_products import BACKENDS

needs_triton = pytest.mark.skipif(
    platform.system() != "Linux" and importlib.util.find_spec("triton") is None,
    reason="Triton has no release for this system",  # on Linux the test extra brings it
)


@needs_triton
def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_row_products.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@needs_triton
def test_every_form_compiles_for_every_gpu_without_spills() -> None:
    compiled = triton_kernels.compiled_rows()
    for arch in TARGETS:
        assert {kernel.kernel for kernel in compiled if kernel.arch == arch} == {case.name for case in ROW_CASES}
    for kernel in compiled:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        threads = kernel.config["num_warps"] * TARGETS[kernel.arch][2]
        assert 0 < kernel.registers * threads <= 32 * 1024, kernel  # at least two blocks a multiprocessor
        assert kernel.shared <= 1024, kernel


def test_gpus_choose_triton_for_want_of_a_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "unavailable", lambda backend: None)
    for version in (None, "7.0"):
        monkeypatch.setattr(torch.version, "hip", version)
        assert _operator.choose_backend("row_products", "auto", torch.device("cuda"), BACKENDS) == "triton"
    assert _operator.choose_backend("row_products", "auto", torch.device("cpu"), BACKENDS) == "cpu"
