"""The tests on the stand-in for CUDA devices: each file in a process of its own, which has the devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cuda.is_built(),
    reason="the stand-in takes the place that torch's CUDA part would have",
)

parts = pytest.mark.parametrize("part", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])


FILES = {
    **dict.fromkeys(("values", "counts", "operators"), "emulated"),
    # their subject is what is called, where and how often
    **dict.fromkeys(("library", "trajectory", "graphs", "waits", "methods"), "borrowed"),
}


@parts
@pytest.mark.parametrize(("file", "kernels"), FILES.items(), ids=FILES)
def test_on_devices(file: str, kernels: str, part: str) -> None:
    path = Path(__file__).with_name(f"on_devices_{file}.py")
    command = [sys.executable, "-m", "pytest", "-p", "stand_in.plugin", "-p", "no:cacheprovider", "-m", part, str(path)]
    environment = os.environ | {"PYDISTILL_KERNELS": kernels}
    if kernels == "emulated":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(command, cwd=path.parents[1], env=environment, capture_output=True, text=True)
    nothing = "exhaustive" in part and run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert run.returncode == 0 or nothing, run.stdout + run.stderr
