"""The Triton kernel of row_products: right in the interpreter, compiled for every GPU, and what GPUs choose."""

from __future__ import annotations

import pytest
import torch
from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts

from pydistill import _library
from pydistill.ops import _operator
from pydistill.ops.row_products import BACKENDS


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("row_products", part)


@needs_triton
@architectures
def test_every_form_compiles_for_every_gpu_without_spills(archs: tuple[str, ...]) -> None:
    check_compiled("row_products", 15, archs, shared=1024)


def test_gpus_choose_triton_for_want_of_a_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "unavailable", lambda backend, device: None)
    for version in (None, "7.0"):
        monkeypatch.setattr(torch.version, "hip", version)
        assert _operator.choose_backend("row_products", "auto", torch.device("cuda"), BACKENDS) == "triton"
    assert _operator.choose_backend("row_products", "auto", torch.device("cpu"), BACKENDS) == "cpu"
