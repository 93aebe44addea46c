from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pydistill.triton import multi_crop as kernels

from . import DTYPES, CompileCase, empty

# element type, form, parts: of one with a base, and painted over one another
CASES = [
    ("f32", "plan", 4),
    *product(DTYPES, ("forward", "backward"), (1,)),
    *product(("f32",), ("forward", "backward", "shared"), (4,)),
]


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, form, parts in CASES:
        x, record = empty((4, 3, 32, 32), scalar), empty((8, parts, 14))
        given = kernels.arguments(x, empty((8, parts, kernels.COLUMNS)), empty((2, 3), "f64"))
        given |= kernels.plan_arguments(record)
        given |= {"images": x, "grads": x, "results": x, "base": x if parts == 1 else None}
        given |= {"LINEAR": False, "SHARED": form == "shared"}
        given |= dict.fromkeys(("N", "H", "W", "height", "width", "base_c", "base_h", "base_w"), 32)
        kernel = {"forward": kernels.multi_crop_kernel, "plan": kernels.multi_crop_plan_kernel}.get(
            form, kernels.multi_crop_backward_kernel
        )
        name = f"multi_crop::triton<{scalar}, {form}, {parts}>"
        yield CompileCase(name, kernel, given, kernels.COMPILER, kernels.COMPILER)
