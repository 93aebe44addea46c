"""What calls of the package cost on a GPU from their second time on: waits of the host, and captures of graphs.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import pytest

from tests.matrices import sample
from tests.stand_in.calls import CALLS

FIRST = ["unroll", "trajectory_match", "three training steps", "outer step of dm", "outer step of mtt"]
# these wait for no device and capture nothing, already
RIGHT = {"three training steps", "three training steps, generic"}


@pytest.mark.parametrize("name", sample(CALLS, FIRST))
def test_calls_do_not_wait_and_capture_once(name: str, request: pytest.FixtureRequest) -> None:
    if name not in RIGHT:
        reason = "the host waits, or graphs are captured anew"
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
    count, allowed = CALLS[name]
    found = count()
    assert len(found.waits) <= allowed, found
    assert found.captures == 0, found
