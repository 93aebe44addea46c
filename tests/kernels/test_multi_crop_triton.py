"""The Triton kernels of multi_crop: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("multi_crop", part)


@needs_triton
@architectures
def test_every_kernel_compiles_for_every_gpu(archs: tuple[str, ...]) -> None:
    check_compiled("multi_crop", 12, archs, shared=2 * 1024, spills=28)  # parts that are painted over one another
