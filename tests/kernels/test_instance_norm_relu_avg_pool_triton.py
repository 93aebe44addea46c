"""The Triton kernels of the block: right in the interpreter, compiled for every GPU, and what is chosen when."""

from __future__ import annotations

import pytest
import torch
from triton_checks import architectures, check_compiled, check_in_the_interpreter, needs_triton, parts

from bench import triton_kernels
from bench.triton_cases.instance_norm_relu_avg_pool import CASES
from pydistill import _library, info, instance_norm_relu_avg_pool
from pydistill.ops import _operator


@needs_triton
@parts
def test_in_the_interpreter(part: str) -> None:
    check_in_the_interpreter("instance_norm_relu_avg_pool", part)


@needs_triton
@architectures
def test_every_kernel_compiles_without_spills_and_sums_statistics_in_one_order(archs: tuple[str, ...]) -> None:
    count, registers = len(CASES) + 2, {"registers": 64 * 1024, "amd_registers": 64 * 1024}
    compiled = check_compiled("instance_norm_relu_avg_pool", count, archs, shared=32 * 1024, **registers)
    # a ReLU opens at the same positions in every form only if mean and variance are the same to the bit
    layouts: dict[tuple[str, ...], set[str]] = {}
    for kernel in compiled:
        for case in CASES:
            if case.name == kernel.kernel:
                group = layouts.setdefault((kernel.arch, case.scalar, case.layout, case.storage), set())
                group.update(kernel.statistics_layouts)
    assert len(layouts) == len(archs) * len(CASES) / 4
    assert all(len(group) == 1 for group in layouts.values()), layouts


@needs_triton
def test_what_fits_is_read_once_and_written_once() -> None:
    """Counted in the interpreter; the few bytes above the minimum are weights and biases."""
    counted = triton_kernels.counted()
    assert counted.keys() == {case.name for case in CASES}
    for case in CASES:
        assert 1 <= counted[case.name] <= (1.005 if case.storage == "kept" else 3), case


def test_named_but_unable() -> None:
    assert not _library.triton_is_interpreted
    x, weight, bias = torch.randn(2, 3, 4, 4), torch.ones(3), torch.zeros(3)
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run on cpu tensors.*TRITON_INTERPRET=1"):
        instance_norm_relu_avg_pool(x, weight, bias, backend="triton")
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run on meta tensors"):
        instance_norm_relu_avg_pool(x.to("meta"), weight.to("meta"), bias.to("meta"), backend="triton")


def choose(backend: str, device: str = "cuda") -> str:
    return _operator.choose_backend("op", backend, torch.device(device), ("reference", "cpu", "cuda", "triton"))


def test_reasons_and_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_library, "_triton_missing", False)
    assert "no GPU is visible" in _library.unavailable("triton")
    assert info.backends()["instance_norm_relu_avg_pool"]["triton"].startswith("no GPU is visible")
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run: no GPU is visible"):
        choose("triton")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info.backends()["instance_norm_relu_avg_pool"]["triton"] == "available"
    assert choose("triton") == "triton"

    monkeypatch.setattr(_library, "_triton_missing", True)
    assert info.backends()["instance_norm_relu_avg_pool"]["triton"] == "triton is not installed"
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run: triton is not installed"):
        choose("triton")


def test_auto_is_triton_on_amd_gpus_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"cuda": "this torch is a build without CUDA"}
    with monkeypatch.context() as nvidia:
        nvidia.setattr(_library, "unavailable", lambda backend: None)
        assert choose("auto") == "cuda"
        assert choose("triton") == "triton"
    monkeypatch.setattr(_library, "unavailable", reasons.get)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose("auto") == "triton"
    assert choose("auto", "cpu") == "cpu"
    with pytest.raises(NotImplementedError, match="this torch is a build without CUDA"):
        choose("cuda")
