"""How Triton's kernels are launched."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from triton_checks import needs_triton

import pydistill.triton

SOURCES = sorted(Path(pydistill.triton.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_launched_on_its_tensors_device_along_one_axis(source: Path) -> None:
    text = source.read_text()
    assert set(re.findall(r"tl\.(?:program_id|num_programs)\((\w+)\)", text)) == {"0"}
    assert "run_programs(" in text
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [node for node in calls if isinstance(node.func, ast.Subscript)]  # kernel[grid](...)


@needs_triton
def test_more_programs_than_a_gpu_runs() -> None:
    from pydistill.triton._launch import run_programs
    from pydistill.triton.row_products import row_products_kernel

    with pytest.raises(ValueError, match=r"row_products_kernel: a GPU runs at most 2\^31 - 1 programs"):
        run_programs(row_products_kernel, 2**31, torch.device("cpu"), {})
