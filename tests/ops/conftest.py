"""Kernels of other instruction sets than this processor's best."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def run_with_isa():
    """Runs a program in a separate process with the kernels of an instruction set; returns its output."""

    def run(isa, program):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYDISTILL_ISA": isa}, capture_output=True, text=True
        )
        if done.returncode and "this processor does not have it" in done.stderr:
            pytest.skip(f"no {isa} here")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
