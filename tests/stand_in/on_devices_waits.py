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


@cache
def counted(name: str) -> Counts:
    return CALLS[name][0]()


@names
def test_calls_do_not_wait(name: str) -> None:
    assert len(counted(name).waits) <= CALLS[name][1], counted(name)


@names
def test_calls_capture_once(name: str) -> None:
    assert counted(name).captures == 0, counted(name)
