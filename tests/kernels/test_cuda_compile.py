"""nvcc compiles every kernel for every architecture; registers and spills stay within bounds."""

from __future__ import annotations

import pytest

from bench.block_forms import FORMS
from bench.kernels import ARCHITECTURES, KERNELS, SCALARS, Resources, compile_kernels, find_nvcc
from tests.matrices import sample

OPERATORS = tuple(sorted(header.stem for header in KERNELS.glob("*.cuh")))
THREADS = {
    "instance_norm_relu_avg_pool": 1024,
    "soft_cross_entropy": 768,
    "augment": 512,
    "multi_crop": 768,
    "bn_stat_match": 1024,
}  # at least, on a multiprocessor at once


@pytest.fixture(scope="module", params=sample(OPERATORS, ["soft_cross_entropy"]))
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[Resources]]:
    if not find_nvcc():
        pytest.skip("nvcc is not on PATH, so the CUDA kernels are not compiled")
    return request.param, compile_kernels(KERNELS / f"{request.param}.cuh")


def expected(operator: str) -> set[str]:
    if operator in ("augment", "multi_crop"):
        return {f"{operator}::kernel<{scalar}, {form}>" for scalar in SCALARS for form in ("forward", "backward")}
    if operator == "bn_stat_match":
        scalars = {f"{operator}::{name}_kernel<{scalar}>" for name in ("tiles", "backward") for scalar in SCALARS}
        return scalars | {f"{operator}::merge_kernel<{scalar}>" for scalar in ("f32", "f64")}
    if operator == "soft_cross_entropy":
        return {f"{operator}::kernel<{scalar}, {form}>" for scalar in SCALARS for form in FORMS}
    return {f"{operator}::sum_over_batch_kernel<{scalar}>" for scalar in ("f32", "f64")} | {
        f"{operator}::kernel<{scalar}, {form}, {storage}>"
        for scalar in SCALARS
        for form in FORMS
        for storage in ("kept", "streamed")
    }


def test_every_kernel_is_there_for_every_architecture(compiled: tuple[str, list[Resources]]) -> None:
    operator, kernels = compiled
    for arch in ARCHITECTURES:
        assert {kernel.kernel for kernel in kernels if kernel.arch == arch} == expected(operator)


def test_no_spills_and_enough_threads_a_multiprocessor(compiled: tuple[str, list[Resources]]) -> None:
    operator, kernels = compiled
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        # 64 Ki registers for all of them; double gets by with 512 threads
        assert 0 < kernel.registers <= 65536 // (512 if "<f64" in kernel.kernel else THREADS[operator]), kernel
        assert kernel.static_shared == 0, kernel
