"""What the CUDA kernels cost before any GPU runs them: registers, spills, shared memory, bytes moved.

``python -m bench.kernels`` compiles every ``csrc/kernels/*.cuh`` with nvcc for the shipped architectures, and writes
``bench/results/kernels.csv``. Registers, spills and static shared memory are as reported by ptxas. Dynamic shared
memory is the launcher's choice for planes of 32x32 and 16 channels on that architecture; `soft_cross_entropy`, a warp
per row, and `multi_crop`, a thread per pixel, ask for none, `augment`, a block per image, for less than a kilobyte:
these have no figures there. Bytes moved are counted, not modelled: the same kernel runs on the host machine of
``cuda_vocabulary.h``, which counts global memory accesses; caches would reduce them, half-used sectors increase them.
The minimum is every input read once and every output written once.

The Triton kernels follow, compiled by Triton for the same architectures and AMD's gfx942, and counted in its
interpreter, at 32x32 with 16 channels, and at 96x96 where the panel is streamed (`bench/triton_cases`). All their
shared memory is dynamic. Bytes are counted of `instance_norm_relu_avg_pool` alone. `row_products` has rows of 27 and
1152 elements. For gfx942 registers are vector registers, spills scratch memory, both of a thread.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

from .block_forms import FORMS, minimum_bytes

REPOSITORY = Path(__file__).parents[1]
KERNELS = REPOSITORY / "csrc" / "kernels"
HOST_LAUNCH = REPOSITORY / "tests" / "kernels" / "host_launch.cpp"
RESULTS = REPOSITORY / "bench" / "results" / "kernels.csv"

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block may opt in to

SCALARS = ("f32", "f64", "bf16", "f16")  # in the order of Scalar in csrc/common/scalar.h
CXX_SCALARS = {"float": "f32", "double": "f64", "__nv_bfloat16": "bf16", "__half": "f16"}
SHAPE = (1, 16, 32, 32)

HOST_FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    spill_stores: int  # bytes, like the next two
    spill_loads: int
    static_shared: int


class Launch(ctypes.Structure):
    """A request to the host machine and its answer: Launch in tests/kernels/host_launch.cpp."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("shared_limit", ctypes.c_int64),
        ("lanes", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("bytes_loaded", ctypes.c_int64),
        ("bytes_stored", ctypes.c_int64),
    )


def build_host_launch(library: Path, *extra_flags: str) -> Path:
    """The launchers on the host machine, as a shared library."""
    subprocess.run(["g++", *HOST_FLAGS, *extra_flags, str(HOST_LAUNCH), "-o", str(library)], check=True)
    return library


def exercise(
    library: ctypes.CDLL,
    form: str,
    scalar: str,
    shape: tuple[int, int, int, int] = SHAPE,
    *,
    relu: bool = False,
    pool: bool = True,
    channels_last: bool = False,
    shared_limit: int = 99 * 1024,
) -> Launch:
    """Runs one form on the host machine, on tensors of zeros that the library allocates.

    Without the ReLU by default: on zeros it would be closed everywhere and save the kernel most of its reads.
    """
    launch = Launch(shared_limit=shared_limit)
    run = library.exercise_instance_norm_relu_avg_pool
    run.restype = ctypes.c_char_p
    error = run(
        FORMS.index(form),
        SCALARS.index(scalar),
        (ctypes.c_int64 * 4)(*shape),
        ctypes.c_bool(relu),
        ctypes.c_bool(pool),
        ctypes.c_bool(channels_last),
        ctypes.byref(launch),
    )
    if error:
        raise RuntimeError(error.decode())
    return launch


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_kernels(header: Path, architectures: Iterable[str] = ARCHITECTURES) -> list[Resources]:
    """Every kernel that `header` launches, compiled for each architecture."""
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in architectures]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.cu"
        source.write_text(f'#include "{header}"\n')
        command = ["nvcc", "-std=c++20", "-O3", "-fatbin", *targets, "-Xptxas=-v", str(source)]
        log = subprocess.run([*command, "-o", f"{folder}/kernels.fatbin"], capture_output=True, text=True)
    if log.returncode:
        raise RuntimeError(log.stderr)
    return parse_ptxas(subprocess.run(["c++filt"], input=log.stderr, capture_output=True, text=True, check=True).stdout)


def parse_ptxas(log: str) -> list[Resources]:
    """The demangled output of `ptxas -v`, in which each kernel has a few lines."""
    found = []
    for name, arch, text in re.findall(
        r"Compiling entry function '(.*)' for '(sm_\w+)'\n((?:(?!.*Compiling entry).*\n)*)", log
    ):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found.append(
            Resources(
                kernel=short_name(name),
                arch=arch,
                registers=number(r"Used (\d+) registers"),
                spill_stores=number(r"(\d+) bytes spill stores"),
                spill_loads=number(r"(\d+) bytes spill loads"),
                static_shared=number(r"(\d+) bytes smem"),
            )
        )
    return sorted(found, key=lambda kernel: (ARCHITECTURES.index(kernel.arch), kernel.kernel))


def short_name(demangled: str) -> str:
    """`void pydistill::op::kernel<float, (pydistill::Op::Form)1, true>(...)` -> `op::kernel<f32, backward, kept>`."""
    name, arguments = re.fullmatch(r"void pydistill::([\w:]+)<(.*?)>\(.*", demangled).groups()
    words = [CXX_SCALARS.get(word, word) for word in arguments.split(", ")]
    words = [FORMS[int(form[1])] if (form := re.fullmatch(r"\(.*::Form\)(\d)", word)) else word for word in words]
    words = [{"true": "kept", "false": "streamed"}.get(word, word) for word in words]
    return f"{name}<{', '.join(words)}>"


@dataclass(frozen=True)
class Row(Resources):
    dynamic_shared_nchw: int | None = None  # bytes, for SHAPE
    dynamic_shared_channels_last: int | None = None
    bytes_to_minimum: float | None = None  # counted bytes over the least possible


def with_launch(kernel: Resources, library: ctypes.CDLL) -> Row:
    match = re.search(r"<(\w+), (\w+), (kept|streamed)>", kernel.kernel)
    if not match:
        return Row(**asdict(kernel))
    scalar, form, storage = match.groups()

    def launched(channels_last: bool) -> Launch:
        # A limit within which the sums fit but no panel does makes a launch stream.
        streamed = 8192 if channels_last else 2048
        limit = SHARED_MEMORY_LIMIT[kernel.arch] if storage == "kept" else streamed
        launch = exercise(library, form, scalar, channels_last=channels_last, shared_limit=limit)
        assert launch.kept == (storage == "kept")
        return launch

    nchw, channels_last = launched(False), launched(True)
    return Row(
        **asdict(kernel),
        dynamic_shared_nchw=nchw.shared_bytes,
        dynamic_shared_channels_last=channels_last.shared_bytes,
        bytes_to_minimum=round((nchw.bytes_loaded + nchw.bytes_stored) / minimum_bytes(form, scalar, SHAPE), 3),
    )


def triton_rows() -> list[Row]:
    from . import triton_kernels  # which imports this module

    counted = triton_kernels.counted()
    rows = []
    for kernel in chain.from_iterable(map(triton_kernels.compiled, triton_kernels.OPERATORS)):
        layout = "channels_last" if "channels_last" in kernel.kernel else "nchw"
        rows.append(
            Row(
                kernel=kernel.kernel,
                arch=kernel.arch,
                registers=kernel.registers,
                spill_stores=kernel.spill_stores,
                spill_loads=kernel.spill_loads,
                static_shared=0,
                bytes_to_minimum=counted.get(kernel.kernel),
                **{f"dynamic_shared_{layout}": kernel.shared},
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output: Path = parser.parse_args().output
    if not find_nvcc():
        raise SystemExit("bench.kernels: nvcc is not on PATH")
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("bench.kernels: triton is not installed")
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(build_host_launch(Path(folder) / "host_launch.so")))
        rows = [
            with_launch(kernel, library)
            for header in sorted(KERNELS.glob("*.cuh"))
            for kernel in compile_kernels(header)
        ]
    rows += triton_rows()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} rows in {output}")


if __name__ == "__main__":
    main()
