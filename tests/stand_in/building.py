"""Compiles the stand-in for CUDA devices, and the package's CUDA operators for it, by g++: once, as long as nothing
that goes into them changes."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "csrc"
BUILT = REPOSITORY / "build" / "stand_in"  # not under version control
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent

FLAGS = ("-std=c++20", "-O1", "-Wall", "-Werror", "-fPIC", "-isystem", str(TORCH / "include"))
LINKS = (f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}")


def devices_library() -> Path:
    """The two devices."""
    folder = HERE / "device"
    # operator libraries look by this name for torch's CUDA part
    return _made("libstand_in.so", [folder / "stand_in.cpp"], folder.glob("*.h"), ["-Wl,-soname,libtorch_cuda.so"])


def operators_library() -> Path:
    """The package's CUDA operators: what nvcc compiles otherwise, on the host machine of ``cuda_vocabulary.h``."""
    headers = (path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh"))
    # the target as in CMakeLists.txt; as on a GPU, a product and a sum are one rounding only where a kernel says so
    target = ("-ffp-contract=off", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    return _made("lib_C_cuda.so", cuda_sources(), headers, target)


def cuda_sources() -> list[Path]:
    return sorted((SOURCES / "ops").glob("*_cuda.cu"))


def foreign_library() -> Path:
    """Operators like another package's, to see which kernel of theirs runs."""
    return _made("libforeign.so", [HERE / "foreign_operators.cpp"])


def _made(name: str, sources: Sequence[Path], headers: Iterable[Path] = (), options: Sequence[str] = ()) -> Path:
    key = hashlib.sha256(repr((FLAGS, options, torch.__version__)).encode())
    for path in sorted({*sources, *headers}):
        key.update(path.read_bytes())
    folder = BUILT / f"{Path(name).stem}-{key.hexdigest()[:16]}"
    library = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may ask for it at once
        if not library.exists():
            objects = [folder / f"{source.stem}.o" for source in sources]
            for source, made in zip(sources, objects, strict=True):
                # .cu files as well, which nvcc compiles otherwise
                _run("g++", *FLAGS, *options, "-c", "-x", "c++", str(source), "-o", str(made))
            unfinished = folder / "unfinished"
            _run("g++", "-shared", *map(str, objects), *LINKS, *options, "-o", str(unfinished))
            unfinished.rename(library)
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
