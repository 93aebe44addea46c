"""What the build says when it cannot continue: one sentence, and what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrices import sample

ROOT = Path(__file__).parents[2]


def configure(tmp_path, *, torch_version=None, torch=True, cuda="OFF", **environment):
    """CMake's configuration step for a Python whose only package, if any, is a torch of some version."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    site = next((env / "lib").glob("python*/site-packages"))
    if torch:
        (site / "torch/include/torch").mkdir(parents=True)
        (site / "torch/include/torch/library.h").touch()
        (site / "torch/version.py").write_text(f"__version__ = '{torch_version}'\n")
    return subprocess.run(
        [
            "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={env / 'bin/python'}",
            "-DSKBUILD_PROJECT_NAME=pydistill", "-DSKBUILD_PROJECT_VERSION=0", f"-DPYDISTILL_CUDA={cuda}",
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch": False}, "pydistill is built against an installed PyTorch and found none: run `pip install"),
        ({"torch_version": "2.9.1+cpu"}, "pydistill needs PyTorch 2.10 or later and found 2.9.1+cpu in"),
        ({"CXX": "/nowhere/g++", "PATH": "/nowhere"}, "found no compiler: install g++ 11 or later"),
    ],
    ids=["no torch", "old torch", "no compiler"],
)
def test_one_clear_sentence(tmp_path, options, message):
    if "PATH" in options:  # only the build tools, so that no compiler is found
        tools = tmp_path / "tools"
        tools.mkdir()
        for tool in ("cmake", "ninja"):
            (tools / tool).symlink_to(shutil.which(tool))
        options = {**options, "PATH": str(tools)}
    result = configure(tmp_path, **options)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert result.stderr.count("CMake Error") == 1, result.stderr


NVCCS = {
    "12.1.105": "80-real, 90-real, 90-virtual",
    "12.4.131": "80-real, 90-real, 90-virtual",
    "12.8.61": "80-real, 90-real, 100-real, 100-virtual",
    "13.0.88": "80-real, 90-real, 100-real, 100-virtual",
}


@pytest.mark.parametrize("version", sample(NVCCS, ["12.4.131"]))
def test_architectures_follow_the_compiler(tmp_path, version):
    toolkit = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    for library in ("cudadevrt", "cudart_static"):
        (toolkit / f"lib64/lib{library}.a").write_text("!<arch>\n")
    nvcc = toolkit / "bin" / "nvcc"
    stand_in = Path(__file__).with_name("stand_in_nvcc.py")
    nvcc.write_text(f'#!/bin/sh\nexec {sys.executable} -S {stand_in} {toolkit} {version} "$@"\n')
    nvcc.chmod(0o755)
    result = configure(tmp_path, torch_version="2.11.0+cu130", cuda="ON", CUDACXX=str(nvcc))
    assert f"pydistill: nvcc {version} for {NVCCS[version]}\n" in result.stdout, result.stdout + result.stderr
