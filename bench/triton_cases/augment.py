from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from pydistill.triton import augment as kernels

from . import DTYPES, CompileCase, empty, wide

FORMS = ("forward", "backward", "means", "means of gradients")


def compile_cases(warp_size: int, hip: bool) -> Iterator[CompileCase]:
    for scalar, form in product(DTYPES, FORMS):
        x, numbers = empty((4, 3, 32, 32), scalar), empty((8, 2), wide(scalar))
        record = torch.zeros(8, 13, device="meta")
        given = kernels.arguments(x, record, numbers, numbers, 4, True)
        given |= {"images": x, "grads": x, "results": x, "LINEAR": False, "COPIES": 2, "BACKWARD": "of" in form}
        kernel = {"forward": kernels.augment_kernel, "backward": kernels.augment_backward_kernel}.get(
            form, kernels.augment_means_kernel
        )
        yield CompileCase(f"augment::triton<{scalar}, {form}>", kernel, given, kernels.COMPILER, kernels.COMPILER)
