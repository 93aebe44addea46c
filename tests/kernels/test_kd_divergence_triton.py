"""The Triton kernels of kd_divergence and sparse_label_loss: right in the interpreter, and compiled for every GPU."""

from __future__ import annotations

import pytest
from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts

from pydistill import info


@needs_triton
@parts
@pytest.mark.parametrize("operator", ["kd_divergence", "sparse_label_loss"])
def test_in_the_interpreter(operator: str, part: str) -> None:
    check_in_the_interpreter(operator, part)


@needs_triton
@architectures
@pytest.mark.parametrize(("operator", "count"), [("kd_divergence", 14), ("sparse_label_loss", 4)])
def test_every_form_compiles_for_every_gpu_without_spills(operator: str, count: int, archs: tuple[str, ...]) -> None:
    check_compiled(operator, count, archs, shared=1024)


def test_info_knows_their_backends() -> None:
    for name in ("kd_divergence", "sparse_label_loss"):
        table = info.backends()[name]
        assert table["reference"] == table["cpu"] == "available"
        assert table["cuda"] == "no such kernel"
        assert table["triton"] != "no such kernel"
