"""The Triton kernels of bn_stat_match: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("bn_stat_match", part)


@needs_triton
@architectures
def test_every_kernel_compiles_for_every_gpu_without_spills(archs: tuple[str, ...]) -> None:
    check_compiled("bn_stat_match", 12, archs, shared=16 * 1024)
