"""Loads the compiled operator libraries, and says why a backend cannot run."""

from __future__ import annotations

import importlib.util
import os
import platform

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


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine, or None if it can."""
    if backend == "cuda":
        if _cuda_error is None and not torch.cuda.is_available():
            return "no CUDA device is visible"
        return _cuda_error
    if backend == "triton":
        if _triton_missing:
            return "triton is not installed"
        if not (triton_is_interpreted or torch.cuda.is_available()):
            return "no GPU is visible, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None


# read once, at the import, for torch.compile does not look into the module
_baseline = _host.isa() == "base" and platform.machine() in ("x86_64", "AMD64")


def unavailable_steps(device: torch.device) -> str | None:
    """Why the student engine's steps cannot run on this machine, or None if they can."""
    if _baseline and device.type == "cpu":
        return "the student engine needs AVX2, and the instruction set here is the baseline"
    return None
