"""Kernels of other instruction sets than this processor's best."""

import os
import subprocess
import sys

import pytest


def _run(isa, program, *arguments, **environment):
    """The finished process of a program with the kernels of an instruction set; None if this processor lacks it."""
    env = os.environ | environment | {"PYDISTILL_ISA": isa}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode and "this processor does not have it" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def run_with_isa():
    """Runs a program in a separate process with the kernels of an instruction set; returns its output."""

    def run(isa, program):
        if (done := _run(isa, program)) is None:
            pytest.skip(f"no {isa} here")
        return done.stdout

    return run


@pytest.fixture
def same_with_every_isa():
    """Runs a program, which prints its instruction set and then what it found, with each one that this processor has.

    What it found must be the same with all of them, and is returned.
    """

    def run(program, *arguments, **environment):
        found = {}
        for isa in ("base", "avx2", "avx512"):
            if done := _run(isa, program, *arguments, **environment):
                name, found[isa] = done.stdout.split(maxsplit=1)
                assert name == isa
        assert "base" in found
        assert len(set(found.values())) == 1, found
        return found["base"]

    return run
