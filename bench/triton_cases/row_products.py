from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pydistill.triton import row_products as kernels

from . import DTYPES, CompileCase, empty, wide

TENSORS = {"forward": "ab", "backward": ("a", "b", "grad_a", "grad_b"), "jvp": ("a", "b", "a_t", "b_t")}
# rows of later convolutions, and of a first
CASES = [*product(DTYPES, TENSORS, (1152,)), *product(("f32",), TENSORS, (27,))]


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, form, length in CASES:
        tensors = {name: empty((1, length), scalar) for name in TENSORS[form]}
        tensors["grad" if form == "backward" else "products"] = empty((1, 1, 4), wide(scalar))
        arguments = kernels.arguments(tensors, (0, 1, length), 0, 1)
        options = {"num_warps": kernels.warps(arguments["BLOCK"]), "enable_fp_fusion": False}
        name = f"row_products::triton<{scalar}, {form}, {length}>"
        config = {"block": arguments["BLOCK"], **options}
        yield CompileCase(name, kernels.row_products_kernel, arguments, options, config)
