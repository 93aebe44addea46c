"""The Triton kernels of the block: right in the interpreter, compiled for every GPU, and what is chosen when."""

from __future__ import annotations

import re
from types import SimpleNamespace

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


@pytest.mark.exhaustive
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
    monkeypatch.setattr(_library, "_cuda_error", "not built")  # nor is a device there to be asked what it is
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


def test_auto_is_the_best_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str] = {}
    monkeypatch.setattr(_library, "unavailable", lambda backend, device: reasons.get(backend))
    assert choose("auto") == "cuda"
    assert choose("triton") == "triton"
    reasons["cuda"] = "this torch is a build without CUDA"
    assert choose("auto") == "triton"
    assert choose("auto", "cpu") == "cpu"
    with pytest.raises(NotImplementedError, match="op: backend='cuda' cannot run: this torch is a build without CUDA"):
        choose("cuda")
    reasons["triton"] = "triton is not installed"
    both = "cuda: this torch is a build without CUDA; triton: triton is not installed"
    with pytest.raises(NotImplementedError, match=f"op: no kernel can run on cuda:1 tensors: {both}"):
        choose("auto", "cuda:1")


def test_info_says_what_auto_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.backends()["augment"]["auto"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "unavailable", lambda backend, device=None: "too old" if backend == "cuda" else None)
    table = info.backends()
    assert table["instance_norm_relu_avg_pool"]["auto"] == "cpu, on GPUs triton (cuda: too old)"
    assert table["max_pool2d"]["auto"] == "cpu, on GPUs none (cuda: no such kernel; triton: no such kernel)"
    assert table["conv2d"]["auto"] == "reference"
    monkeypatch.setattr(_library, "unavailable", lambda backend, device=None: None)
    assert info.backends()["instance_norm_relu_avg_pool"]["auto"] == "cpu, on GPUs cuda"


def test_the_compiler_keeps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_error", None)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda index: (7, 5))
    monkeypatch.setattr(_library, "torch", SimpleNamespace(cuda=cuda, _C=None))  # torch's own would meet the compiler
    monkeypatch.setattr(_library, "_build", {"cuda_architectures": "80-real, 90-virtual", "cuda_toolkit": "13.0"})
    monkeypatch.setattr(_library, "_triton_missing", False)
    monkeypatch.setattr(_library, "_unfit_device", _library._unfit_device.__wrapped__)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + len(choose("auto", "cuda:0"))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == len("triton")


FIT = [
    ((9, 0), "80-real, 90-real", "13.0", 13000),
    ((8, 6), "80-real, 90-real", "12.8", 13010),
    ((12, 0), "80-real, 100-virtual", "12.8", 12080),
    ((10, 3), "100", "13.0", 13000),
    ((9, 0), "90a-real", "12.4", 12040),
    ((10, 3), "100f-real", "12.9", 12090),
    ((9, 0), "80-real, 90-real", "12.9", 12000),  # within a major version drivers take machine code
    ((9, 0), "native", "13.0", 13000),
    ((9, 0), "90-real", "13.0", None),
]
UNFIT = [
    ((7, 5), "80-real, 100-virtual", "13.0", 13000, "built for the architectures 80-real, 100-virtual.* is of sm_75"),
    ((10, 0), "80-real, 90-real", "13.0", 13000, "is of sm_100"),
    ((8, 0), "86-real", "13.0", 13000, "is of sm_80"),
    ((10, 0), "90a", "13.0", 13000, "is of sm_100"),
    ((12, 0), "100f", "13.0", 13000, "is of sm_120"),
    (
        (9, 0),
        "90-real",
        "13.0",
        12080,
        "built by CUDA 13.0, and the driver knows CUDA 12.8 at most: it has to be newer",
    ),
    ((12, 0), "90-real, 90-virtual", "12.8", 12040, "by CUDA 12.8 without machine code for sm_120.* CUDA 12.4 at most"),
]


@pytest.mark.parametrize(("capability", "architectures", "toolkit", "driver"), FIT)
def test_devices_that_the_library_has_code_for(
    capability: tuple[int, int], architectures: str, toolkit: str, driver: int | None
) -> None:
    assert _library.unfit(capability, architectures, toolkit, driver) is None


@pytest.mark.parametrize(("capability", "architectures", "toolkit", "driver", "reason"), UNFIT)
def test_devices_that_it_has_none_for(
    capability: tuple[int, int], architectures: str, toolkit: str, driver: int, reason: str
) -> None:
    assert re.search(reason, _library.unfit(capability, architectures, toolkit, driver))
