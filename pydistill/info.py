"""What was built, and which of it runs here: ``python -m pydistill.info``."""

from __future__ import annotations

import importlib
import pkgutil
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import pydistill
from pydistill import _host, _library, ops
from pydistill.ops._operator import best_on_gpu
from pydistill.ops._precision import resolved
from pydistill.trajectory import FlatModule, convnet_shape
from pydistill.trajectory.recognition import Unrecognised

_BF16_CONVOLUTIONS = {
    "amx": "matrix tiles (AMX)",
    "avx512_bf16": "pairs of factors (AVX512-BF16)",
}  # by instruction set
FREEZING = {
    "CPU": "3x3 convolutions in Winograd's form, ResNet stems, max pooling on our kernels (nn.frozen_convolutions)",
    "GPUs": "no kernel of ours: channels-last memory, no gradients of weights; then --precision bf16, fp16 or tf32",
}  # what nn.freeze does, by where the network is


def backends() -> dict[str, dict[str, str]]:
    """Per operator and backend: "available", or why it is not; and what "auto" takes."""
    table: dict[str, dict[str, str]] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if module.name.startswith("_"):
            continue
        has = importlib.import_module(f"{ops.__name__}.{module.name}").BACKENDS
        table[module.name] = {
            backend: (_library.unavailable(backend) or "available") if backend in has else "no such kernel"
            for backend in ("reference", "cpu", "cuda", "triton")
        } | {"auto": _automatic(has)}
    return table


def _automatic(has: Sequence[str]) -> str:
    on_cpu = "cpu" if "cpu" in has else "reference"
    if not torch.cuda.is_available() or on_cpu == "reference":
        return on_cpu
    found, passed_over = best_on_gpu(has, torch.device("cuda"))
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over.items())
    return f"{on_cpu}, on GPUs {found or 'none'}{reasons and f' ({reasons})'}"


def _automatic_precision() -> str:
    told = "on GPUs what torch's switches say when a run begins, on the CPU ieee"
    return f"{told}: now {resolved('auto', torch.device('cuda'))}" if torch.cuda.is_available() else told


def engine(
    net: torch.nn.Module, image: Sequence[int], device: torch.device | str = "cpu", *, output: int | None = None
) -> str:
    """Which engine `pydistill.unroll` and `pydistill.train_students` run ``net`` on, and why.

    Args:
        net: the student.
        image: ``(C, H, W)`` of the images after augmentation.
        device: where they are.
        output: as for `pydistill.unroll`.

    Returns:
        "student: " and the recognised shape, or "generic: " and what the student engine cannot run. Those nets run on
        autograd: compiling a step takes minutes, and is done only for ``engine="compiled"``.
    """
    if not isinstance(image, Sequence) or len(image) != 3 or not all(isinstance(size, int) for size in image):
        raise TypeError(f"image: expected (C, H, W), got {image!r}")
    try:
        return f"student: {convnet_shape(net, image, FlatModule(net).dtype, device, output=output)}"
    except Unrecognised as reason:
        return f"generic: {reason}; engine='compiled' would compile it"


def collect() -> dict[str, Any]:
    """Everything that `main` prints, as plain values."""
    build = _library._build
    return {
        "pydistill": pydistill.__version__,
        "torch": torch.__version__,
        "built with": f"torch {build['torch_headers']} headers, {build['compiler']}",
        "python": platform.python_version(),
        "CPU instruction set": _host.isa(),
        "CPU threads": torch.get_num_threads(),
        "student engine": _library.unavailable_steps(torch.device("cpu")) or "float32, float64 and bf16",
        "bf16 convolutions": _BF16_CONVOLUTIONS.get(_host.isa(), "rounded factors, in AVX2"),
        **{f"nn.freeze on {where}": what for where, what in FREEZING.items()},
        "CUDA architectures built": build["cuda_architectures"] or "none",
        "CUDA toolkit of the build": build["cuda_toolkit"] or "none",
        'precision "auto"': _automatic_precision(),
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "operators": backends(),
    }


def main() -> None:
    if _library.isa_error is not None:
        sys.exit(f"pydistill.info: {_library.isa_error}")
    facts = collect()
    operators = facts.pop("operators")
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    print("\nstudent engine: ConvNets of 3x3 convolutions, a norm, an activation, a pool and a linear classifier;")
    print("    other nets run on autograd, and pydistill.info.engine(net, image_shape) says why;")
    print("    engine='compiled' compiles their steps (minutes), which 'auto' never does")
    print("with a GPU, too, stored top-k labels are decoded and graph cuts computed on the CPU")
    for op, table in operators.items():
        print(f"\n{op}")
        for backend, state in table.items():
            print(f"  {backend:{width - 2}}  {state}")


if __name__ == "__main__":
    main()
