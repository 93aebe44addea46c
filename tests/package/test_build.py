"""What the build says when it cannot continue: one sentence, and what to do."""

import os
import shlex
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


def commands(tmp_path, cuda):
    """How each file but those of CUDA would be made: by the file's name, in words that do not depend on the folder."""
    folder = tmp_path / cuda
    subprocess.run(
        [
            "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}",
            "-DSKBUILD_PROJECT_NAME=pydistill", "-DSKBUILD_PROJECT_VERSION=0", f"-DPYDISTILL_CUDA={cuda}",
            f"-Dpybind11_DIR={tmp_path}",
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    listed = subprocess.run(["ninja", "-C", folder, "-t", "commands"], check=True, capture_output=True, text=True)
    lines = [shlex.split(line.replace(str(folder), "")) for line in listed.stdout.splitlines()]
    made = {words[words.index("-o") + 1]: words for words in lines if "-o" in words}
    return {name: words for name, words in made.items() if "_C_cuda" not in name}


@pytest.mark.exhaustive
def test_without_cuda_one_file_is_missing_and_the_others_are_the_same(tmp_path):
    """But for what `_host` says of that file, which nobody asks for where it is not."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH, so there is no build with CUDA")
    module = "function(pybind11_add_module name)\nlist(REMOVE_ITEM ARGN MODULE NO_EXTRAS)\n"
    (tmp_path / "pybind11Config.cmake").write_text(module + "add_library(${name} MODULE ${ARGN})\nendfunction()\n")
    found, without = commands(tmp_path, "ON"), commands(tmp_path, "OFF")
    assert any(name.endswith("_C.so") for name in without)
    assert any("library.cpp" in name for name in without)
    assert found.keys() == without.keys()
    for name, words in without.items():
        both = [[word for word in line if not word.startswith("-DPYDISTILL_CUDA_")] for line in (found[name], words)]
        assert both[0] == both[1]
        assert "csrc/host/" in name or both == [found[name], words]


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
