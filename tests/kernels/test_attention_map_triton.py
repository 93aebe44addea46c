"""The Triton kernels of attention_map: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("attention_map", part)


@needs_triton
@architectures
def test_both_kernels_compile_for_every_gpu_without_spills(archs: tuple[str, ...]) -> None:
    check_compiled("attention_map", 16, archs, shared=32 * 1024)
