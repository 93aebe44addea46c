"""How Triton's kernels are launched."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

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
@pytest.mark.parametrize(
    ("hip", "num_warps", "most"),
    [(None, 4, 2**31 - 1), ("7.0", 4, 2**24 - 1), ("7.0", 1, 2**26 - 1), ("7.0", 8, 2**23 - 1)],  # 2^32 - 1 threads
)
def test_more_programs_than_a_gpu_runs(
    hip: str | None, num_warps: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydistill.triton._launch import run_programs

    class Kernel:
        started: ClassVar[list[tuple[int, ...]]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **options: self.started.append((*grid, options["num_warps"]))

        @staticmethod
        def fn() -> None: ...

    monkeypatch.setattr(torch.version, "hip", hip)
    kernel, device = Kernel(), torch.device("cpu")
    run_programs(kernel, most, device, {}, num_warps=num_warps)
    with pytest.raises(ValueError, match=f"fn: a GPU runs at most {most} programs at once, this needs {most + 1}"):
        run_programs(kernel, most + 1, device, {}, num_warps=num_warps)
    assert kernel.started == [(most, num_warps)]
