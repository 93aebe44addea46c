from __future__ import annotations

from collections.abc import Iterator

import torch

from pydistill.triton import soft_cross_entropy as kernels

from . import CompileCase, empty, wide

# element type, kind of labels, form
CASES = [
    *(("f32", kind, form) for kind in (0, 1, 2) for form in ("forward", "backward_jvp")),
    *((scalar, 1, "backward_jvp") for scalar in ("f64", "bf16", "f16")),
]
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, kind, form in CASES:
        x, column = empty((4, 1000), scalar), empty((4,), wide(scalar))
        labels = torch.zeros(4, dtype=torch.int64, device="meta") if kind == 0 else x
        tensors = {"logits": x, "labels": labels, "loss": column}
        if form == "backward_jvp":
            tensors |= {"logits_t": x, "grad": column, "grad_t": column, "grad_logits": x}
            tensors |= {} if kind == 0 else {"labels_t": x, "grad_labels": x}
        given = kernels.arguments(tensors, kind)
        name = f"soft_cross_entropy::triton<{scalar}, {kind}, {form}>"
        yield CompileCase(name, kernels.soft_cross_entropy_kernel, given, OPTIONS, {"block": given["BLOCK"], **OPTIONS})
