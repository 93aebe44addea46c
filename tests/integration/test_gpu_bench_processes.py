"""bench.gpu's items in processes: one that hangs or dies is told, and the others go on."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.gpu import session
from bench.gpu.session import Item, Line, lines_in, supervise


def works(tiny: bool) -> Line:
    return {"tiny": tiny, "pid": os.getpid()}


def hangs(tiny: bool) -> Line:
    """As a call of a library that keeps the interpreter's lock and never returns: no handler of Python's runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    ctypes.PyDLL(None).sleep(60)
    return {}


def dies(tiny: bool) -> Line:
    ctypes.string_at(0)
    return {}


def run_some(names: Sequence[str], path: Path, minutes: float, stacks: Path, tiny: bool) -> None:
    session.GRACE = 0.3
    session.device_is_there = lambda stacks=None: True
    items = (Item("first", works), Item("hangs", hangs, 0.2), Item("dies", dies), Item("never", works))
    with stacks.open("a") as file:
        session.faulthandler.enable(file)
        session.leave(
            session.run_items([each for each in items if each.name in names], path, minutes, tiny=tiny, stacks=stacks)
        )


@pytest.mark.exhaustive
def test_what_hangs_or_dies_takes_no_other_along(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    supervise(run_some, ["first", "hangs", "dies"], out, 1.0, tiny=True)
    first, hung, died = lines_in(out)
    assert (first["item"], first["status"], first["tiny"]) == ("first", "ok", True)
    assert first["pid"] != os.getpid()
    assert (hung["item"], hung["status"], hung["error"]) == ("hangs", "died", "hung, exit status 1")
    assert "in hangs" in hung["traceback"]
    assert (died["item"], died["status"], died["error"]) == (
        "dies",
        "died",
        f"its process ended, exit status {-signal.SIGSEGV}",
    )
    assert "in string_at" in died["traceback"]
