"""The tests on the stand-in for CUDA devices, in processes that have the devices: one for each way of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# it is written against what torch 2.13 is inside
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cuda.is_built() or VERSION < (2, 13),
    reason="the stand-in takes the place that torch's CUDA part would have",
)

parts = pytest.mark.parametrize("part", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])


FILES = {
    "emulated": ("values", "counts", "operators"),
    # their subject is what is called, where and how often
    "borrowed": ("library", "trajectory", "graphs", "waits", "methods", "ranks", "bench"),
}


@parts
@pytest.mark.parametrize("kernels", FILES)
def test_on_devices(kernels: str, part: str) -> None:
    here = Path(__file__).parent
    files = [str(here / f"on_devices_{name}.py") for name in FILES[kernels]]
    command = [sys.executable, "-m", "pytest", "-p", "stand_in.plugin", "-p", "no:cacheprovider", "-m", part, *files]
    environment = os.environ | {"PYDISTILL_KERNELS": kernels}
    if kernels == "emulated":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(command, cwd=here.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_every_file_is_run() -> None:
    found = {path.stem.removeprefix("on_devices_") for path in Path(__file__).parent.glob("on_devices_*.py")}
    assert found == {name for names in FILES.values() for name in names}
