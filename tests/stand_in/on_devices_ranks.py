"""Two processes with a device each, under torchrun, reach what one does.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stand_in.ranks import run_method


@pytest.mark.parametrize("name", ["mtt", pytest.param("dm", marks=pytest.mark.exhaustive)])
def test_work_is_shared_over_two_devices(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "stand_in.ranks", name, str(tmp_path / "two")],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run_method(name, tmp_path / "one")
    two, one = (load_file(tmp_path / ranks / "distilled.safetensors") for ranks in ("two", "one"))
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
