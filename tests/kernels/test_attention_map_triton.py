"""The Triton kernels of attention_map: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import check_compiled, check_in_the_interpreter, needs_triton


@needs_triton
def test_in_the_interpreter() -> None:
    check_in_the_interpreter("attention_map")


@needs_triton
def test_both_kernels_compile_for_every_gpu_without_spills() -> None:
    check_compiled("attention_map", 16, shared=32 * 1024)
