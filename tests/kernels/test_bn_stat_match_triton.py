"""The Triton kernels of bn_stat_match: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import check_compiled, check_in_the_interpreter, needs_triton


@needs_triton
def test_in_the_interpreter() -> None:
    check_in_the_interpreter("bn_stat_match")


@needs_triton
def test_every_kernel_compiles_for_every_gpu_without_spills() -> None:
    check_compiled("bn_stat_match", 12, shared=16 * 1024)
