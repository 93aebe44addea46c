"""The package's operators on the devices, in a build without CUDA: those of Triton, against those of the CPU.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices, on such a build.
"""

from __future__ import annotations

import pytest
import torch

from pydistill import info
from tests.stand_in.kernels import cuda_operators
from tests.stand_in.on_devices_operators import PLACES, USES, check_values, derivatives

REASON = "pydistill was built without _C_cuda"


@pytest.mark.parametrize(
    ("name", "dtype", "place"),
    [
        (name, dtype, place)
        for name, use in USES.items()
        for dtype in use.dtypes
        for place in PLACES
        if place == "cuda:1" or dtype == torch.float32
    ],
)
def test_values_are_the_cpus(name: str, dtype: torch.dtype, place: str) -> None:
    check_values(name, "auto", dtype, place)


@pytest.mark.parametrize("name", USES)
def test_a_named_kernel_of_cuda_raises(name: str) -> None:
    reason = f"cannot run: {REASON}" if "cuda" in USES[name].backends else "has no cuda kernel"
    with pytest.raises(NotImplementedError, match=reason):
        derivatives(USES[name], "cuda:0", torch.float32, "cuda")


def test_the_report_says_which_and_why() -> None:
    facts = info.collect()
    assert facts["CUDA architectures built"] == facts["CUDA toolkit of the build"] == "none"
    with_cuda = {name.split("::")[1].split("_backward")[0].split("_jvp")[0] for name in cuda_operators()}
    for name in with_cuda:
        table = facts["operators"][name]
        assert (table["cuda"], table["triton"]) == (REASON, "available")
        assert table["auto"] == f"cpu, on GPUs triton (cuda: {REASON})"


def test_no_operator_of_cuda_is_there() -> None:
    for name in cuda_operators():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
