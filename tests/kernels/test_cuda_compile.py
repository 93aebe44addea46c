"""nvcc compiles every kernel for every architecture; registers and spills stay within bounds."""

from __future__ import annotations

import pytest

from bench.kernels import ARCHITECTURES, FORMS, KERNELS, SCALARS, Resources, compile_kernels, find_nvcc


@pytest.fixture(scope="module")
def compiled() -> list[Resources]:
    if not find_nvcc():
        pytest.skip("nvcc is not on PATH, so the CUDA kernels are not compiled")
    return compile_kernels(KERNELS / "instance_norm_relu_avg_pool.cuh")


def test_every_kernel_is_there_for_every_architecture(compiled: list[Resources]) -> None:
    operator = "instance_norm_relu_avg_pool"
    expected = {f"{operator}::sum_over_batch_kernel<{scalar}>" for scalar in ("f32", "f64")} | {
        f"{operator}::kernel<{scalar}, {form}, {storage}>"
        for scalar in SCALARS
        for form in FORMS
        for storage in ("kept", "streamed")
    }
    for arch in ARCHITECTURES:
        assert {kernel.kernel for kernel in compiled if kernel.arch == arch} == expected


def test_no_spills_and_two_blocks_a_multiprocessor(compiled: list[Resources]) -> None:
    for kernel in compiled:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        # 64 Ki registers for two blocks of 512 threads; double gets by with one block
        assert 0 < kernel.registers <= (128 if "<f64" in kernel.kernel else 64), kernel
        assert kernel.static_shared == 0, kernel
