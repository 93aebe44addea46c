"""``pytest -p stand_in.plugin``, from the folder of the tests: the devices are there before anything is imported.

PYDISTILL_KERNELS says which kernels of the package they have.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last, so that pydistill is the installed one

import torch

from tests.stand_in import building, devices, kernels

devices.load(building.devices_library())
torch.ops.load_library(str(building.foreign_library()))
kernels.KERNELS[os.environ.get("PYDISTILL_KERNELS", "emulated")]()


@pytest.fixture(autouse=True, scope="session")
def _devices() -> Iterator[None]:
    with devices.devices():
        yield


@pytest.fixture(autouse=True)
def _captured_on_the_first_device_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps one stream for all captures that are given none, of the device that was current at the first."""
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", torch.cuda.Stream("cuda:0"))
