from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pydistill.triton import attention_map as kernels

from . import DTYPES, CompileCase, empty, wide

# pass, element type, power, order of the derivative, whether there is a factor
CASES = [
    (name, scalar, power, order, factor)
    for name, scalar in product(("reduce", "adjoint"), DTYPES)
    for power, order, factor in ((4.0, 0 if name == "reduce" else 1, False), (2.5, 1, True))
]


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for name, scalar, power, order, factor in CASES:
        x, maps = empty((1, 64, 32, 32), scalar), empty((1, 1024), wide(scalar))
        given = {"x": x, "factor": x, "out": maps if name == "reduce" else x, "spatial": maps, "channel": maps}
        sizes = ("sample", "kept", "summed", "kept_stride", "summed_stride")
        given |= dict.fromkeys((*sizes, "channels", "positions", "channel_stride", "position_stride"), 64)
        given |= {"HAS_FACTOR": factor, "HAS_SPATIAL": True, "HAS_CHANNEL": True}
        given |= {"BLOCK": kernels.BLOCK, "ROWS": kernels.ROWS, **kernels.constants(power, order)}
        kernel, options = getattr(kernels, f"attention_map_{name}_kernel"), {"num_warps": 4}
        title = f"attention_map::triton_{name}<{scalar}, {power:g}, {order}{', factor' if factor else ''}>"
        yield CompileCase(title, kernel, given, options, options)
