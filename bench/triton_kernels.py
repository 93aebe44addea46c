"""The Triton kernels' part of `bench.kernels`: what the compiler reports, and their memory accesses.

Triton chooses compiler or interpreter when a kernel is defined, so each has a separate process: `compiled` and
`counted` start them. The compiler needs no GPU: it builds for sm_80, sm_90, sm_100 and AMD's gfx942.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import ROOT
from .kernels import FORMS, SHAPE, minimum_bytes

TARGETS = {  # backend, architecture, threads per warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = {"kept": SHAPE, "streamed": (1, 4, 96, 96)}


@dataclass(frozen=True)
class Case:
    """One call of the kernel of instance_norm_relu_avg_pool."""

    scalar: str
    form: str
    layout: str
    storage: str

    @property
    def name(self) -> str:
        return f"instance_norm_relu_avg_pool::triton<{self.scalar}, {self.form}, {self.layout}, {self.storage}>"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return SHAPES[self.storage]


CASES = [
    Case(*words)
    for words in (
        *product(DTYPES, FORMS, LAYOUTS, ("kept",)),
        *product(("f32", "f64"), FORMS, LAYOUTS, ("streamed",)),  # values in registers there have these types
    )
]


@dataclass(frozen=True)
class RowCase:
    """One call of the kernel of row_products: rows of ``length`` elements."""

    scalar: str
    form: str
    length: int

    @property
    def name(self) -> str:
        return f"row_products::triton<{self.scalar}, {self.form}, {self.length}>"


# rows of later convolutions, and of a first
_ROW_FORMS = ("forward", "backward", "jvp")
ROW_CASES = [
    RowCase(*words) for words in (*product(DTYPES, _ROW_FORMS, (1152,)), *product(("f32",), _ROW_FORMS, (27,)))
]


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


def tensors_of(case: Case, device: str) -> dict[str, Tensor | None]:
    """The kernel's tensors by name: zeros."""
    N, C, H, W = case.shape
    dtype = DTYPES[case.scalar]
    compute = torch.float64 if case.scalar == "f64" else torch.float32

    def image(h: int, w: int) -> Tensor:
        zeros = torch.zeros(N, C, h, w, dtype=dtype, device=device)
        return zeros.contiguous(memory_format=LAYOUTS[case.layout])

    def matrix(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=compute, device=device)

    tensors = {"x": image(H, W), "weight": matrix(C), "bias": matrix(C)}
    if "jvp" in case.form:
        tensors |= {"x_t": image(H, W), "weight_t": matrix(C), "bias_t": matrix(C)}
    if "backward" in case.form:
        tensors |= {"grad_y": image(H // 2, W // 2), "grad_x": image(H, W)}
        tensors |= {"grad_weight": matrix(N, C), "grad_bias": matrix(N, C)}
    if case.form == "backward_jvp":
        tensors["grad_y_t"] = image(H // 2, W // 2)
    if case.form != "backward":
        tensors["y"] = image(H // 2, W // 2)
    return tensors


def compiled(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """Every kernel of `CASES`, and the sum over the batch, for each architecture."""
    return _compiled("compile", architectures)


def _compiled(task: str, architectures: Iterable[str]) -> list[Compiled]:
    with tempfile.TemporaryDirectory() as cache:  # shares nothing with earlier or later runs
        output = _in_own_process(task, *architectures, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")
    return [Compiled(**row) for row in output]


def compiled_rows(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """Every kernel of `ROW_CASES` for each architecture."""
    return _compiled("compile_rows", architectures)


# of attention_map: pass, element type, power, order of the derivative, whether there is a factor
MAP_CASES = [
    (name, scalar, power, order, factor)
    for name, scalar in product(("reduce", "adjoint"), DTYPES)
    for power, order, factor in ((4.0, 0 if name == "reduce" else 1, False), (2.5, 1, True))
]


def map_name(name: str, scalar: str, power: float, order: int, factor: bool) -> str:
    return f"attention_map::triton_{name}<{scalar}, {power:g}, {order}{', factor' if factor else ''}>"


def compiled_maps(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """Both kernels of attention_map in every one of `MAP_CASES` for each architecture."""
    return _compiled("maps", architectures)


# of attention_map_divergence: element type, features of both sides' heads, whether there is a mask, kind
ATTENTION_CASES = [
    ("f32", 64, False, "fkl"),
    ("f32", 64, True, "jsd"),
    ("f32", 128, False, "rkl"),
    ("bf16", 64, False, "ce"),
    ("bf16", 128, True, "jsd"),
    ("f16", 16, False, "fkl"),
]
ATTENTION_PASSES = ("rows", "grad_q", "grad_k")


def attention_name(name: str, scalar: str, width: int, masked: bool, kind: str) -> str:
    return f"attention_map_divergence::triton_{name}<{scalar}, {kind}, {width}{', masked' if masked else ''}>"


def compiled_attention(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """The passes of attention_map_divergence in every one of `ATTENTION_CASES`, as `compiled` does."""
    return _compiled("attention", architectures)


# of bn_stat_match: kernel, element type, layout
BN_CASES = [
    *product(("tiles", "backward"), DTYPES, ("channels_last",)),
    *product(("tiles", "backward"), ("f32",), ("nchw",)),
    *product(("merge",), ("f32", "f64"), ("nchw",)),
]


def bn_name(name: str, scalar: str, layout: str) -> str:
    return f"bn_stat_match::triton_{name}<{scalar}, {layout}>"


def compiled_bn(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """The kernels of bn_stat_match in every one of `BN_CASES`, with residual and ReLU, as `compiled` does."""
    return _compiled("bn", architectures)


# of kd_divergence: element type, kind, target_is, form, classes
KD_CASES = [
    *(("f32", kind, "logits", "forward", 1000) for kind in range(7)),
    *((scalar, 0, "logits", "forward", 1000) for scalar in ("bf16", "f16")),
    *(("f32", kind, "logits", "backward_jvp", 1000) for kind in (0, 2, 5)),
    *(("f32", 2, "probs", form, 100) for form in ("backward", "jvp")),
]
# of sparse_label_loss: element type, tail, whether values are codes, whether for the backward pass
SPARSE_CASES = [
    ("f32", 0, False, False),
    ("f32", 0, False, True),
    ("f32", 2, True, False),
    ("bf16", 0, True, False),
]


def kd_name(scalar: str, kind: int, target_is: str, form: str, classes: int) -> str:
    return f"kd_divergence::triton<{scalar}, {kind}, {target_is}, {form}, {classes}>"


def sparse_name(scalar: str, tail: int, codes: bool, backward: bool) -> str:
    return f"sparse_label_loss::triton<{scalar}, {tail}{', codes' if codes else ''}{', backward' if backward else ''}>"


def compiled_label_losses(architectures: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """The kernels of kd_divergence and sparse_label_loss in every one of their cases, as `compiled` does."""
    return _compiled("label_losses", architectures)


def counted() -> dict[str, float]:
    """For each case, by name, the bytes loaded and stored, relative to the least possible."""
    return _in_own_process("count", TRITON_INTERPRET="1")


def _in_own_process(*arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "bench.triton_kernels", *arguments]
    run = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout)


def _compile(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import instance_norm_relu_avg_pool as kernels

    rows = []
    for arch in architectures:
        warp_size = TARGETS[arch][2]
        for case in CASES:
            tensors = tensors_of(case, "meta")
            config = kernels.configure(tensors["x"], warp_size)
            # the switches as users have them: with the ReLU and the pool
            arguments = kernels.arguments(tensors, config, 1e-5, True, True)
            options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
            row = _compile_one(case.name, arch, kernels.instance_norm_relu_avg_pool_kernel, arguments, options)
            rows.append(Compiled(**row, config=asdict(config)))
        for scalar in ("f32", "f64"):
            shares = torch.zeros(1, 1, dtype=DTYPES[scalar], device="meta")
            arguments = {"shares": shares, "total": shares, "N": 1, "C": 1}
            arguments |= {"BLOCK": kernels.SUM_BLOCK, "UNROLL": kernels.SUM_UNROLL}
            name = f"instance_norm_relu_avg_pool::triton_sum_over_batch<{scalar}>"
            row = _compile_one(name, arch, kernels.sum_over_batch_kernel, arguments, {"num_warps": 1})
            rows.append(Compiled(**row, config={"num_warps": 1}))
    return rows


def _compile_rows(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import row_products as kernels

    rows = []
    for arch, case in product(architectures, ROW_CASES):
        compute = torch.float64 if case.scalar == "f64" else torch.float32
        names = {"forward": "ab", "jvp": ("a", "b", "a_t", "b_t"), "backward": ("a", "b", "grad_a", "grad_b")}[
            case.form
        ]
        tensors = {name: torch.zeros(1, case.length, dtype=DTYPES[case.scalar], device="meta") for name in names}
        other = "grad" if case.form == "backward" else "products"
        tensors[other] = torch.zeros(1, 1, 4, dtype=compute, device="meta")
        arguments = kernels.arguments(tensors, (0, 1, case.length), 0, 1)
        options = {"num_warps": kernels.warps(arguments["BLOCK"]), "enable_fp_fusion": False}
        row = _compile_one(case.name, arch, kernels.row_products_kernel, arguments, options)
        rows.append(Compiled(**row, config={"block": arguments["BLOCK"], **options}))
    return rows


def _compile_maps(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import attention_map as kernels

    rows = []
    for arch, (name, scalar, power, order, factor) in product(architectures, MAP_CASES):
        x = torch.zeros(1, 64, 32, 32, dtype=DTYPES[scalar], device="meta")
        maps = torch.zeros(1, 1024, dtype=torch.float64 if scalar == "f64" else torch.float32, device="meta")
        given = {"x": x, "factor": x, "out": maps if name == "reduce" else x, "spatial": maps, "channel": maps}
        sizes = ("sample", "kept", "summed", "kept_stride", "summed_stride")
        given |= dict.fromkeys((*sizes, "channels", "positions", "channel_stride", "position_stride"), 64)
        given |= {"HAS_FACTOR": factor, "HAS_SPATIAL": True, "HAS_CHANNEL": True}
        given |= {"BLOCK": kernels.BLOCK, "ROWS": kernels.ROWS, **kernels.constants(power, order)}
        kernel = getattr(kernels, f"attention_map_{name}_kernel")
        arguments = {parameter.name: given[parameter.name] for parameter in kernel.params}
        row = _compile_one(map_name(name, scalar, power, order, factor), arch, kernel, arguments, {"num_warps": 4})
        rows.append(Compiled(**row | {"statistics_layouts": []}, config={"num_warps": 4}))
    return rows


def _compile_attention(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import attention_map_divergence as kernels

    rows = []
    kinds = ("fkl", "rkl", "jsd", "ce")  # in the order of Kind in csrc/kernels/attention_map_divergence.h
    for arch, (scalar, width, masked, kind) in product(architectures, ATTENTION_CASES):
        heads = torch.zeros(1, 1, 128, width, dtype=DTYPES[scalar], device="meta")
        column = torch.zeros(1, 1, 128, device="meta")
        mask = torch.zeros(1, 1, 128, 128, dtype=torch.uint8, device="meta") if masked else None
        config = kernels.configure(heads, heads, hip=TARGETS[arch][0] == "hip")
        inputs = {**dict.fromkeys(("q_s", "k_s", "q_t", "k_t"), heads), "mask": mask}
        shared = kernels.arguments(inputs, config, (0.125, 0.125, kinds.index(kind), 0.5))
        shared |= dict.fromkeys(kernels.STATISTICS, column)
        outputs = {"rows": {"loss": column}, "grad_q": {"grad": column, "grad_q": heads}}
        outputs["grad_k"] = {"grad": column, "grad_k": heads}
        for name in ATTENTION_PASSES:
            kernel = getattr(kernels, f"attention_map_divergence_{name}_kernel")
            options = {"num_warps": config.num_warps, **kernels.COMPILER}
            given = {parameter.name: (shared | outputs[name])[parameter.name] for parameter in kernel.params}
            row = _compile_one(attention_name(name, scalar, width, masked, kind), arch, kernel, given, options)
            rows.append(Compiled(**row | {"statistics_layouts": []}, config=asdict(config)))
    return rows


def _compile_bn(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import bn_stat_match as kernels

    rows = []
    for arch, (name, scalar, layout) in product(architectures, BN_CASES):
        x = torch.zeros(2, 64, 56, 56, dtype=DTYPES[scalar], device="meta")
        x = x.contiguous(memory_format=LAYOUTS[layout]).flatten(2)
        column = torch.zeros(64, dtype=torch.float64 if scalar == "f64" else torch.float32, device="meta")
        tensors = dict.fromkeys(kernels.PLANES, x)
        tensors |= dict.fromkeys(
            ("scale", "shift", "mean", "grad_statistics", "partial", "statistics", "kept_mean"), column
        )
        config = kernels.configure(x)
        kernel = getattr(kernels, f"bn_stat_match_{name}_kernel")
        arguments = kernels.arguments(kernel, tensors, config, True)
        options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
        row = _compile_one(bn_name(name, scalar, layout), arch, kernel, arguments, options)
        rows.append(Compiled(**row | {"statistics_layouts": []}, config=asdict(config)))
    return rows


def _compile_label_losses(architectures: Iterable[str]) -> list[Compiled]:
    from pydistill.triton import kd_divergence, sparse_label_loss

    def matrix(classes: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(4, classes, dtype=dtype, device="meta")

    options, rows = {"num_warps": 4, "enable_fp_fusion": False}, []
    column, numbers = torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    for arch in architectures:
        calls = []
        for case in KD_CASES:
            scalar, kind, target_is, form, classes = case
            x = matrix(classes, DTYPES[scalar])
            tensors = {"student": x, "labels": numbers} | ({} if kind == 4 else {"target": x})
            tensors |= {"student_t": x} if "jvp" in form else {}
            tensors |= {"grad": column} if "backward" in form else {}
            tensors |= {"loss": column} if form != "backward" else {}
            tensors |= {"grad_logits": x} if form != "jvp" else {}
            given = kd_divergence.arguments(tensors, (kind, target_is == "probs", 4.0, 16.0, 0.5, 0.3, 1.5))
            calls.append((kd_name(*case), kd_divergence.kd_divergence_kernel, given))
        for case in SPARSE_CASES:
            scalar, tail, codes, backward = case
            x, indices = matrix(1000, DTYPES[scalar]), torch.zeros(4, 10, dtype=torch.int64, device="meta")
            tensors = {"logits": x, "indices": indices, "grad_logits": x}
            tensors["values"] = torch.zeros(4, 10, dtype=torch.uint8 if codes else torch.float32, device="meta")
            tensors["grad" if backward else "loss"] = column
            given = sparse_label_loss.arguments(tensors, (4.0, tail, 0.05, True, 1.0))
            calls.append((sparse_name(*case), sparse_label_loss.sparse_label_loss_kernel, given))
        for name, kernel, given in calls:
            arguments = {parameter.name: given[parameter.name] for parameter in kernel.params}
            row = _compile_one(name, arch, kernel, arguments, options)
            rows.append(Compiled(**row | {"statistics_layouts": []}, config={"block": given["BLOCK"], **options}))
    return rows


def _compile_one(name: str, arch: str, kernel: Any, arguments: dict[str, Any], options: dict) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton_types = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    triton_types |= {torch.uint8: "u8", torch.int64: "i64"}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
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
    source = ASTSource(kernel, signature, {argument: arguments[argument] for argument in constants})
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        result = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)

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
    return {
        "kernel": name,
        "arch": arch,
        "registers": registers,
        "spill_stores": spills[0],
        "spill_loads": spills[1],
        "shared": result.metadata.shared,
        "statistics_layouts": statistics_layouts(result.asm["ttgir"], 4 if "jvp" in name else 2),
    }


def statistics_layouts(ttgir: str, count: int) -> list[str]:
    """The layouts of the first ``count`` summed tiles [positions, lanes], spelled out, without repetition."""
    names = re.findall(r"^ *\}\) : \(tensor<\d+x\d+xf\d+, (#\w+)>\)", ttgir, re.MULTILINE)[:count]
    return sorted({re.search(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[1] for name in names})


def _count() -> dict[str, float]:
    """What the interpreter is asked to load and store; masked elements do not count."""
    from triton.runtime.interpreter import InterpreterBuilder

    from pydistill.triton import instance_norm_relu_avg_pool as kernels

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
    task, *architectures = sys.argv[1:]
    compilers = {"compile": _compile, "compile_rows": _compile_rows}
    compilers |= {"maps": _compile_maps, "attention": _compile_attention}
    compilers |= {"bn": _compile_bn, "label_losses": _compile_label_losses}
    print(json.dumps([asdict(row) for row in compilers[task](architectures)] if task in compilers else _count()))
