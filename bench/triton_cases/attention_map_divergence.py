from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from pydistill.triton import attention_map_divergence as kernels

from . import CompileCase, empty

KINDS = ("fkl", "rkl", "jsd", "ce")  # in the order of Kind in csrc/kernels/attention_map_divergence.h
# element type, features of both sides' heads, whether there is a mask, kind
CASES = [
    ("f32", 64, False, "fkl"),
    ("f32", 64, True, "jsd"),
    ("f32", 128, False, "rkl"),
    ("bf16", 64, False, "ce"),
    ("bf16", 128, True, "jsd"),
    ("f16", 16, False, "fkl"),
]


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, width, masked, kind in CASES:
        heads, column = empty((1, 1, 128, width), scalar), empty((1, 1, 128))
        mask = torch.zeros(1, 1, 128, 128, dtype=torch.uint8, device="meta") if masked else None
        config = kernels.configure(heads, heads, hip=hip)
        inputs = {**dict.fromkeys(("q_s", "k_s", "q_t", "k_t"), heads), "mask": mask}
        shared = kernels.arguments(inputs, config, (0.125, 0.125, KINDS.index(kind), 0.5))
        shared |= dict.fromkeys(kernels.STATISTICS, column)
        outputs = {"rows": {"loss": column}, "grad_q": {"grad": column, "grad_q": heads}}
        outputs["grad_k"] = {"grad": column, "grad_k": heads}
        for name, own in outputs.items():
            kernel = getattr(kernels, f"attention_map_divergence_{name}_kernel")
            options = {"num_warps": config.num_warps, **kernels.COMPILER}
            title = f"attention_map_divergence::triton_{name}<{scalar}, {kind}, {width}{', masked' if masked else ''}>"
            yield CompileCase(title, kernel, shared | own, options, asdict(config))
