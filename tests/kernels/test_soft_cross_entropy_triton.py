"""The Triton kernel of soft_cross_entropy: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("soft_cross_entropy", part)


@needs_triton
@architectures
def test_every_form_compiles_for_every_gpu(archs: tuple[str, ...]) -> None:
    check_compiled("soft_cross_entropy", 9, archs, shared=2048, spills=16)  # in float64 on sm_80; elsewhere none
