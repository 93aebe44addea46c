"""What every test gets: uninitialised memory holds NaN, and the random state is the same whatever ran before."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # for bench; last, so that pydistill is the installed one


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # with deterministic algorithms torch fills what empty() returns, also for the kernels' own allocations
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
