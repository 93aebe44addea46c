"""Kernels of other instruction sets than this processor's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])


def printed(isa, program):
    """What a program prints in a process of its own with the kernels of an instruction set; None if there is none."""
    lines = f"import sys; sys.path.append({ROOT!r})", program, "from pydistill import _host; print(_host.isa())"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"PYDISTILL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode and "this processor does not have it" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    out, _, used = done.stdout.rstrip().rpartition("\n")
    assert used == isa
    return out


@pytest.fixture
def run_with_isa():
    """Runs a program with the kernels of an instruction set; returns what it printed. It may import from `tests`."""

    def run(isa, program):
        if (out := printed(isa, program)) is None:
            pytest.skip(f"no {isa} here")
        return out

    return run


@pytest.fixture
def same_in_every_isa():
    """Runs a program with each set of kernels that this processor has: it prints the same. Returns what it printed."""

    def run(program):
        found = {isa: out for isa in ("base", "avx2", "avx512") if (out := printed(isa, program)) is not None}
        assert found["base"]
        assert set(found.values()) == {found["base"]}, found
        return found["base"]

    return run
