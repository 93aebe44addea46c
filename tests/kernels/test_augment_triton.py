"""The Triton kernels of augment: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("augment", part)


@needs_triton
@architectures
def test_every_kernel_compiles_for_every_gpu(archs: tuple[str, ...]) -> None:
    check_compiled("augment", 16, archs, shared=4 * 1024, spills=20)  # the adjoint, on sm_90 and sm_100
