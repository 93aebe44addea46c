from __future__ import annotations

from collections.abc import Iterator

import torch

from pydistill.triton import kd_divergence as kernels

from . import CompileCase, empty

# element type, kind, target_is, form, classes
CASES = [
    *(("f32", kind, "logits", "forward", 1000) for kind in range(7)),
    *((scalar, 0, "logits", "forward", 1000) for scalar in ("bf16", "f16")),
    *(("f32", kind, "logits", "backward_jvp", 1000) for kind in (0, 2, 5)),
    *(("f32", 2, "probs", form, 100) for form in ("backward", "jvp")),
]
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    column, numbers = empty((4,)), torch.zeros(4, dtype=torch.int64, device="meta")
    for scalar, kind, target_is, form, classes in CASES:
        x = empty((4, classes), scalar)
        tensors = {"student": x, "labels": numbers} | ({} if kind == 4 else {"target": x})
        tensors |= {"student_t": x} if "jvp" in form else {}
        tensors |= {"grad": column} if "backward" in form else {}
        tensors |= {"loss": column} if form != "backward" else {}
        tensors |= {"grad_logits": x} if form != "jvp" else {}
        given = kernels.arguments(tensors, (kind, target_is == "probs", 4.0, 16.0, 0.5, 0.3, 1.5))
        name = f"kd_divergence::triton<{scalar}, {kind}, {target_is}, {form}, {classes}>"
        yield CompileCase(name, kernels.kd_divergence_kernel, given, OPTIONS, {"block": given["BLOCK"], **OPTIONS})
