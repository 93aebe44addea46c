"""The block with its ReLU and its pool, as users have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from ..kernels import FORMS, SHAPE
from . import DTYPES, LAYOUTS, CompileCase, empty, wide

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
        *product(("f32", "f64"), FORMS, LAYOUTS, ("streamed",)),  # what is kept in registers there is of these types
    )
]


def tensors_of(case: Case, device: str) -> dict[str, Tensor | None]:
    """The kernel's tensors by name: zeros."""
    N, C, H, W = case.shape
    dtype, compute = DTYPES[case.scalar], DTYPES[wide(case.scalar)]

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


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    from pydistill.triton import instance_norm_relu_avg_pool as kernels  # needs Triton, which the rest does not

    for case in CASES:
        tensors = tensors_of(case, "meta")
        config = kernels.configure(tensors["x"], warp_size)
        arguments = kernels.arguments(tensors, config, 1e-5, True, True)
        options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        statistics, kernel = 4 if "jvp" in case.form else 2, kernels.instance_norm_relu_avg_pool_kernel
        yield CompileCase(case.name, kernel, arguments, options, asdict(config), statistics)
    for scalar in ("f32", "f64"):
        shares = empty((1, 1), scalar)
        arguments = {"shares": shares, "total": shares, "N": 1, "C": 1}
        arguments |= {"BLOCK": kernels.SUM_BLOCK, "UNROLL": kernels.SUM_UNROLL}
        name, options = f"instance_norm_relu_avg_pool::triton_sum_over_batch<{scalar}>", {"num_warps": 1}
        yield CompileCase(name, kernels.sum_over_batch_kernel, arguments, options, options)
