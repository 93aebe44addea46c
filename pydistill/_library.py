"""Loads the compiled operator libraries, and knows why a backend cannot run."""

from __future__ import annotations

import importlib.util

import torch


def _load(name: str) -> str | None:
    """Load ``pydistill.<name>`` into torch's dispatcher; the reason why not, or None."""
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


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine, or None where it can."""
    if backend == "cuda":
        if _cuda_error is None and not torch.cuda.is_available():
            return "no CUDA device is visible"
        return _cuda_error
    return None
