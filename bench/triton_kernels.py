"""The Triton kernels' part of `bench.kernels`: what the compiler reports, and their memory accesses.

What is compiled stands in `bench/triton_cases`, a file an operator. Triton decides between compiler and interpreter
when a kernel is defined, so each has a process of its own: `compiled` and `counted` start them. The compiler needs no
GPU: it builds for sm_80, sm_90, sm_100 and AMD's gfx942.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import ROOT, triton_cases
from .kernels import minimum_bytes
from .triton_cases import CompileCase

TARGETS = {  # backend, architecture, threads per warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OPERATORS = sorted(found.name for found in pkgutil.iter_modules(triton_cases.__path__))


@dataclass(frozen=True)
class Compiled:
    """What the compilers report for one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int  # per thread, like the next two
    spill_stores: int  # bytes; for AMD vector registers' scratch memory
    spill_loads: int
    shared: int  # bytes per block
    config: dict[str, Any]
    statistics_layouts: list[str]  # how the tiles summed to means and variances are distributed over threads


def compiled(operator: str, architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """Every kernel of the cases of ``operator``, for each architecture."""
    with tempfile.TemporaryDirectory() as cache:  # nothing of an earlier run, and nothing for a later one
        output = _in_own_process(operator, *architectures, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")
    return [Compiled(**row) for row in output]


def counted() -> dict[str, float]:
    """For each case of the block, by name, the bytes that are loaded and stored, over the least possible."""
    return _in_own_process("count", TRITON_INTERPRET="1")


def _in_own_process(*arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "bench.triton_kernels", *arguments]
    run = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout)


def _compile(operator: str, architectures: Iterable[str]) -> list[Compiled]:
    cases = importlib.import_module(f"{triton_cases.__name__}.{operator}")
    return [
        _compile_one(case, arch)
        for arch in architectures
        for case in cases.compile_cases(TARGETS[arch][2], TARGETS[arch][0] == "hip")
    ]


def _compile_one(case: CompileCase, arch: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton_types = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    triton_types |= {torch.uint8: "u8", torch.int64: "i64"}
    arguments = {parameter.name: case.arguments[parameter.name] for parameter in case.kernel.params}
    constants = {parameter.name for parameter in case.kernel.params if parameter.is_constexpr}
    constants |= {argument for argument, value in arguments.items() if value is None}
    signature = {
        argument: "constexpr"
        if argument in constants
        else f"*{triton_types[value.dtype]}"
        if isinstance(value, Tensor)
        else "fp32"
        if isinstance(value, float)
        else "i32"
        for argument, value in arguments.items()
    }
    source = ASTSource(case.kernel, signature, {argument: arguments[argument] for argument in constants})
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        result = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=case.options)

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text)[1])

    if TARGETS[arch][0] == "cuda":
        registers = number(r"Used (\d+) registers", log.getvalue())
        spills = [number(rf"(\d+) bytes spill {kind}", log.getvalue()) for kind in ("stores", "loads")]
    else:
        assembly = result.asm["amdgcn"]
        registers = number(r"\.vgpr_count: +(\d+)", assembly)
        scratch = number(r"\.private_segment_fixed_size: +(\d+)", assembly)
        spills = [max(scratch, 4 * number(r"\.vgpr_spill_count: +(\d+)", assembly))] * 2
    layouts = statistics_layouts(result.asm["ttgir"], case.statistics)
    return Compiled(case.name, arch, registers, *spills, result.metadata.shared, case.config, layouts)


def statistics_layouts(ttgir: str, count: int) -> list[str]:
    """The layouts of the first ``count`` summed tiles [positions, lanes], spelled out, without repetition."""
    names = re.findall(r"^ *\}\) : \(tensor<\d+x\d+xf\d+, (#\w+)>\)", ttgir, re.MULTILINE)[:count]
    return sorted({re.search(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[1] for name in names})


def _count() -> dict[str, float]:
    """What the interpreter is asked to load and store; masked elements do not count."""
    from triton.runtime.interpreter import InterpreterBuilder

    from pydistill.triton import instance_norm_relu_avg_pool as kernels

    from .triton_cases.instance_norm_relu_avg_pool import CASES, tensors_of

    moved = 0

    def counting(method: Any, mask_at: int) -> Any:
        def wrapper(self: Any, pointers: Any, *rest: Any) -> Any:
            nonlocal moved
            moved += int(rest[mask_at].data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
            return method(self, pointers, *rest)

        return wrapper

    InterpreterBuilder.create_masked_load = counting(InterpreterBuilder.create_masked_load, 0)
    InterpreterBuilder.create_masked_store = counting(InterpreterBuilder.create_masked_store, 1)
    ratios = {}
    for case in CASES:
        moved = 0
        kernels.launch(tensors_of(case, "cpu"), 1e-5, True, True)
        ratios[case.name] = round(moved / minimum_bytes(case.form, case.scalar, case.shape), 3)
    return ratios


if __name__ == "__main__":
    operator, *architectures = sys.argv[1:]
    print(json.dumps(_count() if operator == "count" else [asdict(row) for row in _compile(operator, architectures)]))
