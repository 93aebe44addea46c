"""With residual and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

from pydistill.triton import bn_stat_match as kernels

from . import DTYPES, LAYOUTS, CompileCase, empty, wide

# kernel, element type, layout
CASES = [
    *product(("tiles", "backward"), DTYPES, ("channels_last",)),
    *product(("tiles", "backward"), ("f32",), ("nchw",)),
    *product(("merge",), ("f32", "f64"), ("nchw",)),
]
COLUMNS = ("scale", "shift", "mean", "grad_statistics", "partial", "statistics", "kept_mean")


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for name, scalar, layout in CASES:
        x = empty((2, 64, 56, 56), scalar).contiguous(memory_format=LAYOUTS[layout]).flatten(2)
        tensors = dict.fromkeys(kernels.PLANES, x) | dict.fromkeys(COLUMNS, empty((64,), wide(scalar)))
        config = kernels.configure(x)
        kernel = getattr(kernels, f"bn_stat_match_{name}_kernel")
        arguments = kernels.arguments(kernel, tensors, config, True)
        options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
        yield CompileCase(
            f"bn_stat_match::triton_{name}<{scalar}, {layout}>", kernel, arguments, options, asdict(config)
        )
