"""What calls of the package cost on a GPU from their second time on: waits of the host, and captures of graphs.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.matrices import sample
from tests.stand_in.calls import CALLS
from tests.stand_in.counts import Counts

FIRST = [
    *("unroll", "unroll, augmented", "trajectory_match", "three training steps", "outer step of dm"),
    *(
        "outer step of mtt",
        "outer step of dc",
        "outer step of rat_bptt",
        "krr_loss",
        "three steps of train",
        "MultiCrop",
    ),
]
names = pytest.mark.parametrize("name", sample(CALLS, FIRST))
# these capture no graphs anew
RIGHT = {
    *("unroll, generic", "unroll, generic, augmented", "unroll, generic, stored on the host", "krr_loss"),
    *("class_gradients, generic", "MultiCrop"),
    *(name for name in CALLS if name.startswith("three ")),
    *(f"outer step of {name}" for name in ("dm", "datadam", "datadam, batch norm", "atom", "fyi_dm", "fedlgd")),
}


@cache
def counted(name: str) -> Counts:
    return CALLS[name][0]()


@names
def test_calls_do_not_wait(name: str) -> None:
    found = counted(name)
    waits = [reason for reason in found.waits if reason != "synchronize"]  # which a capture does before and after
    assert len(waits) <= CALLS[name][1], found
    assert len(found.waits) - len(waits) <= 2 * found.captures, found


@names
def test_calls_capture_once(name: str, request: pytest.FixtureRequest) -> None:
    if name not in RIGHT:
        request.applymarker(
            pytest.mark.xfail(strict=True, raises=AssertionError, reason="graphs are captured anew in each call")
        )
    assert counted(name).captures == 0, counted(name)
