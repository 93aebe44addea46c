from __future__ import annotations

from collections.abc import Iterator

import torch

from pydistill.triton import sparse_label_loss as kernels

from . import CompileCase, empty

# element type, tail, whether values are codes, whether for the backward pass
CASES = [
    ("f32", 0, False, False),
    ("f32", 0, False, True),
    ("f32", 2, True, False),
    ("bf16", 0, True, False),
]
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, tail, codes, backward in CASES:
        x, indices = empty((4, 1000), scalar), torch.zeros(4, 10, dtype=torch.int64, device="meta")
        tensors = {"logits": x, "indices": indices, "grad_logits": x}
        tensors["values"] = torch.zeros(4, 10, dtype=torch.uint8 if codes else torch.float32, device="meta")
        tensors["grad" if backward else "loss"] = empty((4,))
        given = kernels.arguments(tensors, (4.0, tail, 0.05, True, 1.0))
        words = f"{scalar}, {tail}{', codes' if codes else ''}{', backward' if backward else ''}"
        name, config = f"sparse_label_loss::triton<{words}>", {"block": given["BLOCK"], **OPTIONS}
        yield CompileCase(name, kernels.sparse_label_loss_kernel, given, OPTIONS, config)
