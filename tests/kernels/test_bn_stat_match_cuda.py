"""The CUDA kernels of bn_stat_match, run on the host machine, against plain torch."""

from __future__ import annotations

import pytest
import torch
from host_machine import SCALARS, HostMachine
from torch import Tensor

from pydistill.testing import assert_close

# blocks have 8 rows of 32 channels, or 256 positions; tiles here are smaller than on a GPU, to have several
SHAPES = [(2, 5, 37), (1, 33, 9), (3, 1, 300), (1, 3, 2), (2, 64, 1), (1, 2, 700)]
TILE = {"planes": 290, "rows": 11}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def guarded(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """A tensor, and the memory of which it is the middle."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), -77.0, dtype=dtype)
    view = memory[32:-32]
    if layout == "rows" and len(shape) == 3:
        return view.view(shape[0], shape[2], shape[1]).transpose(1, 2), memory
    return view.view(shape), memory


def check_guards(*memories: Tensor) -> None:
    for memory in memories:
        assert (memory[:32] == -77).all()
        assert (memory[-32:] == -77).all()
        assert not (memory[32:-32] == -77).any()


def planes(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    view = guarded(shape, dtype, layout)[0]
    return view.copy_(3 + 2 * torch.randn(shape))


def run(
    host: HostMachine, x: Tensor, layout: str, *, norm: bool, residual: Tensor | None, relu: bool, seed: int = 0
) -> dict[str, Tensor]:
    N, C, P = x.shape
    tile, wide = TILE[layout], compute(x.dtype)
    random = torch.Generator().manual_seed(5)
    vector = lambda *size: torch.randn(size, generator=random, dtype=torch.float64).to(wide)  # noqa: E731
    per_channel = {"scale": vector(C), "shift": vector(C)} if norm else {}
    of_tiles = N * -(-P // tile)
    (y, y_memory), (partial, partial_memory) = guarded(x.shape, x.dtype, layout), guarded((of_tiles, 3, C), wide, "")
    (statistics, statistics_memory), (kept, kept_memory) = guarded((2, C), wide, ""), guarded((C,), wide, "")
    outputs = {"partial": partial, "statistics": statistics, "kept_mean": kept}
    given = {"x": x, "relu": relu, "residual": residual, **per_channel, **outputs, "y": y if norm else None}
    host.bn_stat_match("tiles", tile, seed=seed, **given)
    host.bn_stat_match("merge", tile, seed=seed + 1, **given)
    check_guards(partial_memory, statistics_memory, kept_memory, *([y_memory] if norm else []))
    torch.testing.assert_close(kept, statistics[0], rtol=0, atol=0, equal_nan=True)

    grad_statistics = vector(2, C)
    grad_y = planes(x.shape, x.dtype, layout) if norm else None
    (grad_x, x_memory), (grad_residual, residual_memory) = (guarded(x.shape, x.dtype, layout) for _ in range(2))
    results = {"grad_x": grad_x, "grad_residual": None if residual is None else grad_residual}
    inputs = {"x": x, "relu": relu, "residual": residual, **per_channel, "grad_y": grad_y, "mean": kept}
    host.bn_stat_match("backward", tile, seed=seed, **inputs, grad_statistics=grad_statistics, **results)
    check_guards(x_memory, *([residual_memory] if residual is not None else []))
    found = {"statistics": statistics, "grad_x": grad_x, **per_channel, "grad_statistics": grad_statistics}
    found |= {"y": y, "grad_y": grad_y} if norm else {}
    return found | ({"grad_residual": grad_residual} if residual is not None else {})


def truth(x: Tensor, residual: Tensor | None, relu: bool, found: dict[str, Tensor]) -> dict[str, Tensor]:
    x = x.double().requires_grad_()
    leaves = [x]
    outputs = [torch.stack([x.mean((0, 2)), x.var((0, 2), unbiased=False)])]
    cotangents = [found["grad_statistics"].double()]
    out = {"statistics": outputs[0]}
    if "y" in found:
        y = found["scale"].double().view(-1, 1) * x + found["shift"].double().view(-1, 1)
        if residual is not None:
            leaves.append(residual.double().requires_grad_())
            y = y + leaves[1]
        out["y"] = y.relu() if relu else y
        outputs.append(out["y"])
        cotangents.append(found["grad_y"].double())
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return out | dict(zip(("grad_x", "grad_residual"), gradients, strict=False))


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", SCALARS, ids=str)
def test_against_plain_torch(host: HostMachine, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        x, residual = (planes(shape, dtype, layout) for _ in range(2))
        for norm, has_residual, relu in ((False, False, False), (True, False, True), (True, True, True)):
            summand = residual if has_residual else None
            options = {"norm": norm, "residual": summand, "relu": relu}
            torch.manual_seed(1)
            found = run(host, x, layout, **options)
            for name, want in truth(x, summand, relu, found).items():
                floor = TOLERANCE[compute(dtype) if name == "statistics" else dtype]
                assert_close(f"{shape} {name}", found[name], want, rtol=4 * floor)
            torch.manual_seed(1)
            again = run(host, x, layout, **options, seed=7)
            assert all(torch.equal(found[name], again[name]) for name in found), "the order of threads shows"


def test_a_mean_far_from_zero(host: HostMachine) -> None:
    for layout in TILE:
        x = planes((2, 3, 500), torch.float32, layout)
        x += 1e4
        found = run(host, x, layout, norm=False, residual=None, relu=False)["statistics"]
        want = torch.stack([x.double().mean((0, 2)), x.double().var((0, 2), unbiased=False)])
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


def test_strides_and_layouts_of_others(host: HostMachine) -> None:
    """Every second position, strides like an expanded gradient's, a residual of the other layout."""
    x = torch.full((2, 5, 75), torch.nan)[..., 1::2].copy_(torch.randn(2, 5, 37))
    residual = planes((2, 5, 37), torch.float32, "rows")
    torch.manual_seed(1)
    found = run(host, x, "planes", norm=True, residual=residual, relu=True)
    torch.manual_seed(1)
    dense = run(host, x.contiguous(), "planes", norm=True, residual=residual.contiguous(), relu=True)
    assert all(torch.equal(found[name], dense[name]) for name in found)


def test_nan_spoils_its_channel_and_no_other(host: HostMachine) -> None:
    x = planes((2, 4, 40), torch.float32, "rows")
    x[1, 2, 7] = torch.nan
    found = run(host, x, "rows", norm=True, residual=None, relu=True)
    assert torch.equal(found["y"].isnan(), x.isnan())
    assert torch.equal(found["statistics"].isnan().any(0), torch.tensor([False, False, True, False]))
