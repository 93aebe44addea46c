"""The tests on the stand-in for CUDA devices, in processes that have the devices: one for each way of kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import pydistill
from pydistill import _host

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


WITHOUT_CUDA = "without_cuda"


def run(kernels: str, part: str, names: Iterable[str], **environment: str) -> None:
    here = Path(__file__).parent
    files = [str(here / f"on_devices_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "stand_in.plugin", "-p", "no:cacheprovider", "-m", part, *files]
    environment = os.environ | environment | {"PYDISTILL_KERNELS": kernels}
    if kernels != "borrowed":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(command, cwd=here.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@parts
@pytest.mark.parametrize("kernels", FILES)
def test_on_devices(kernels: str, part: str) -> None:
    run(kernels, part, FILES[kernels])


@pytest.mark.exhaustive
def test_a_build_without_cuda(tmp_path: Path) -> None:
    """A copy of the package that lacks one file: `test_build.py` looks that there is no other difference."""
    copy = tmp_path / "pydistill"
    shutil.copytree(pydistill.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*"))
    for library in Path(_host.__file__).parent.glob("_*.so"):  # elsewhere, if the installation is editable
        if not library.name.startswith("_C_cuda"):
            shutil.copy(library, copy)
    text = (copy / "__init__.py").read_text()
    alone = "".join(line for line in text.splitlines(True) if not line.startswith("__path__ = "))
    assert alone != text  # it would look for the compiled parts in other copies, too
    (copy / "__init__.py").write_text(alone)
    run("left out", "", [WITHOUT_CUDA], PYTHONPATH=str(tmp_path))


def test_every_file_is_run() -> None:
    found = {path.stem.removeprefix("on_devices_") for path in Path(__file__).parent.glob("on_devices_*.py")}
    assert found == {WITHOUT_CUDA}.union(*FILES.values())
