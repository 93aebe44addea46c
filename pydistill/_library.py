"""Loads the compiled operator libraries, and says why a backend cannot run."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re

import torch

from pydistill import _host


def _load(name: str) -> str | None:
    """Load ``pydistill.<name>`` into torch's dispatcher; None, or the reason for failure."""
    spec = importlib.util.find_spec(f"pydistill.{name}")
    if spec is None or spec.origin is None:
        return f"pydistill was built without {name}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{spec.origin} did not load: {error}"
    return None


_cpu_error = _load("_C")
if _cpu_error is not None:
    raise ImportError(f"pydistill's compiled operators are missing ({_cpu_error}); reinstall with `pip install .`")

_cuda_error = "this torch is a build without CUDA" if torch.version.cuda is None else _load("_C_cuda")


# Triton chooses compiler or interpreter when a kernel is defined; read here equally early, and once
triton_is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_triton_missing = importlib.util.find_spec("triton") is None


def _driver_version() -> int | None:
    """The newest CUDA that the driver knows, as 1000 major + 10 minor; None if torch does not say."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if version is None else version()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _runs_on(architecture: str, capability: int) -> tuple[bool, bool]:
    """Whether a device has use for what CMake compiles for an architecture ("80", "90a-real", "100-virtual"): for its
    machine code, and for its PTX."""
    match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture)
    if match is None:  # "native" and the like: whoever built it chose
        return True, True
    number, only, kind = int(match[1]), match[2], match[3]
    same_family = number // 10 == capability // 10
    machine_code = number == capability if only == "a" else same_family and number <= capability
    ptx = machine_code if only else number <= capability
    return machine_code and kind != "-virtual", ptx and kind != "-real"


def unfit(capability: tuple[int, int], architectures: str, toolkit: str, driver: int | None) -> str | None:
    """Why a library for these architectures, built by that CUDA toolkit, has no code for a device; None if it has."""
    here = 10 * capability[0] + capability[1]
    names = [name.strip() for name in architectures.split(",")]
    machine_code, ptx = (any(found) for found in zip(*(_runs_on(name, here) for name in names), strict=True))
    if not (machine_code or ptx):
        return f"built for the architectures {architectures}, and the device is of sm_{here}"
    major, minor = map(int, toolkit.split(".")[:2])
    if driver is None or driver >= 1000 * major + 10 * minor:
        return None
    if driver // 1000 < major:
        return f"built by CUDA {toolkit}, and the driver knows CUDA {_version(driver)} at most: it has to be newer"
    if not machine_code:  # which is all that a driver of the same major version takes
        return (
            f"built by CUDA {toolkit} without machine code for sm_{here}, and its PTX is too new for the driver, which "
            f"knows CUDA {_version(driver)} at most"
        )
    return None


_build = _host.build_info()
if importlib.util.find_spec("pydistill._C_cuda") is None:  # the facts are that library's: without it there are none
    _build |= dict.fromkeys(("cuda_architectures", "cuda_toolkit"), "")


@functools.cache
def _unfit_device(index: int) -> str | None:
    facts = _build["cuda_architectures"], _build["cuda_toolkit"], _driver_version()
    return unfit(torch.cuda.get_device_capability(index), *facts)


def unavailable(backend: str, device: torch.device | None = None) -> str | None:
    """Why ``backend`` cannot run on ``device`` (of GPUs: by default the current one), or None if it can."""
    if backend == "cuda":
        if _cuda_error is not None:
            return _cuda_error
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        index = None if device is None or device.type != "cuda" else device.index
        return _unfit_device(torch.cuda.current_device() if index is None else index)
    if backend == "triton":
        if _triton_missing:
            return "triton is not installed"
        if not (triton_is_interpreted or torch.cuda.is_available()):
            return "no GPU is visible, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None


# torch.compile calls it and keeps the answer; torch's own decorator would import the compiler
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _instruction_set() -> tuple[str, str | None]:
    try:
        return _host.isa(), None
    except RuntimeError as error:
        return "", str(error)


# read once, at the import, for torch.compile does not look into the module; why PYDISTILL_ISA is refused, the commands
# say in a line, and the first kernel in an error
_isa, isa_error = _instruction_set()
_baseline = _isa == "base" and platform.machine() in ("x86_64", "AMD64")


def unavailable_steps(device: torch.device) -> str | None:
    """Why the student engine's steps cannot run on this machine, or None if they can."""
    if _baseline and device.type == "cpu":
        return "the student engine needs AVX2, and the instruction set here is the baseline"
    return None
