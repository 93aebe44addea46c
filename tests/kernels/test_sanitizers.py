"""The kernels on the host machine under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels import build_host_launch

pytestmark = pytest.mark.exhaustive  # to build the library with sanitizers takes half a minute

REPOSITORY = Path(__file__).parents[2]
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

# Every form in every layout and storage; odd planes, channels that end within a block, element types of each size.
EXERCISE = """
import ctypes, itertools, sys
from bench.block_forms import FORMS
from bench.kernels import exercise
library = ctypes.CDLL(sys.argv[1])
launches = []
for form, pool, last, (scalar, C) in itertools.product(
    FORMS, (True, False), (True, False), (("f32", 9), ("f64", 3), ("bf16", 17))
):
    for limit in (99 * 1024, 4096):
        shape, options = (1, C, 23, 29), dict(pool=pool, channels_last=last, shared_limit=limit)
        launches.append(exercise(library, form, scalar, shape, **options))
assert {launch.kept for launch in launches} == {0, 1}
for form in FORMS:
    exercise(library, form, "f16", (1, 1, 1, 1), pool=False, relu=True)
    exercise(library, form, "f16", (0, 5, 4, 4))
library.exercise_soft_cross_entropy.restype = ctypes.c_char_p
for form, scalar, kind, (N, K) in itertools.product(range(4), range(4), range(3), ((5, 37), (1, 1), (0, 3))):
    error = library.exercise_soft_cross_entropy(form, scalar, kind, ctypes.c_int64(N), ctypes.c_int64(K))
    assert not error, error
library.exercise_augment.restype = ctypes.c_char_p
record = (ctypes.c_float * 13)(0.2, 1.5, 0.7, 2, -3, 1, -1, 4, 5, 1, 0.8, 1.2, 0.3)
for form, scalar, flip_batch, shape in itertools.product(
    range(2), range(4), (False, True), ((2, 3, 9, 7), (1, 5, 1, 4), (0, 3, 4, 4))
):
    sizes = (ctypes.c_int64 * 4)(*shape)
    error = library.exercise_augment(form, scalar, sizes, ctypes.c_bool(flip_batch), record)
    assert not error, error
library.exercise_multi_crop.restype = ctypes.c_char_p
parts = ((1, 0, 1, 9, 6, 1, -2, 3, 0, 0, 0, 5, 8, 1), (0, 8, 0, 1, 7, 0, 1, 0, 1, 1, 2, 4, 6, 0.5))
crops = (ctypes.c_float * 28)(*itertools.chain(*parts))
for form, scalar, shared, shape in itertools.product(
    range(2), range(4), (False, True), ((2, 3, 9, 7, 3, 5, 8), (2, 5, 9, 7, 1, 5, 8), (0, 3, 9, 7, 2, 5, 8))
):
    sizes = (ctypes.c_int64 * 7)(*shape)
    error = library.exercise_multi_crop(form, scalar, sizes, ctypes.c_bool(shared and form == 1), crops)
    assert not error, error
print("clean")
"""

SMALL_KERNEL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.run_small_kernel.restype = ctypes.c_char_p
out = (ctypes.c_float * 65)()
for seed in range(8):
    error = library.run_small_kernel(sys.argv[2].encode(), ctypes.c_uint64(seed), 1, 64, ctypes.c_int64(256), out)
    print(error and error.decode())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_host_launch(tmp_path_factory.mktemp("sanitized") / "host_launch.so", *SANITIZE)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),  # the interpreter itself is not instrumented
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",  # CPython leaks; fibers must cope with both
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Printed at the first switch by a sanitizer that cannot know that the machine announces each switch.
    note = "ASan doesn't fully support makecontext/swapcontext"
    result.stderr = "".join(line for line in result.stderr.splitlines(True) if note not in line)
    return result


def test_kernels_are_clean(library: Path) -> None:
    result = run(EXERCISE, str(library))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["clean"]
    assert not result.stderr


def test_shared_memory_out_of_bounds_is_noticed(library: Path) -> None:
    result = run(SMALL_KERNEL, str(library), "out_of_bounds")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "out_of_bounds_kernel" in result.stderr


@pytest.mark.parametrize("kernel", ["throw", "barrier_for_some", "shuffle_for_some"])
def test_a_failing_block_unwinds_cleanly(library: Path, kernel: str) -> None:
    result = run(SMALL_KERNEL, str(library), kernel)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert len(result.stdout.splitlines()) == 8
    assert "None" not in result.stdout
