"""The host machine must detect the bugs it is meant for: one kernel each in host_launch.cpp."""

from __future__ import annotations

import pytest
import torch
from host_machine import HostMachine


@pytest.mark.parametrize("seed", range(3))
def test_right_kernel_is_right_in_any_order(host: HostMachine, seed: int) -> None:
    for block in (1, 31, 64, 1024):
        assert torch.equal(host.small_kernel("right", block, seed=seed)[:block], torch.arange(block - 1.0, -1, -1))


def test_race_shows_as_unwritten_memory_and_as_two_results(host: HostMachine) -> None:
    runs = [host.small_kernel("race", seed=seed) for seed in (0, 1)]
    assert all(run.isnan().any() for run in runs)
    assert not torch.equal(runs[0].isnan(), runs[1].isnan())
    assert torch.equal(host.small_kernel("race", seed=1).isnan(), runs[1].isnan()), "a seed repeats an order"


def test_unwritten_shared_memory_is_nan_in_every_block(host: HostMachine) -> None:
    assert host.small_kernel("unwritten", grid=2)[:64].isnan().all()
    host.small_kernel("right")
    assert host.small_kernel("unwritten")[:64].isnan().all()


def test_blocks_and_threads_run_in_a_random_order(host: HostMachine) -> None:
    def turns(seed: int) -> torch.Tensor:
        return host.small_kernel("order", block=8, grid=16, shared_floats=0, seed=seed)[:-1].reshape(16, 8)

    assert torch.equal(turns(0).flatten().sort().values, torch.arange(128.0))
    assert not torch.equal(turns(0).amin(1).argsort(), turns(1).amin(1).argsort())
    assert not torch.equal(turns(0)[0].argsort(), torch.arange(8))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "barrier_for_some",
            r"block \(0, 0, 0\) threads 0-15 wait in __syncthreads at host_launch.cpp:\d+, threads 16-63 returned",
        ),
        ("two_barriers", r"threads 0-15 wait in __syncthreads at .*, threads 16-63 wait in __syncthreads at"),
        ("shuffle_for_some", r"threads 0-4 wait in __shfl_xor_sync at .*, threads 5-5 returned, threads 6-31 wait"),
        ("shuffle_outside_mask", "reads from one that the mask leaves out"),
        ("throw", "thread 7 of 64 threw"),
    ],
)
def test_faults_are_named_and_leave_the_machine_usable(host: HostMachine, kernel: str, message: str) -> None:
    for seed in range(4):
        with pytest.raises(RuntimeError, match=message):
            host.small_kernel(kernel, seed=seed)
        assert not host.small_kernel("right", seed=seed).isnan().any()


@pytest.mark.parametrize(
    ("block", "grid", "shared_floats", "message"),
    [(0, 1, 0, "threads"), (1025, 1, 0, "threads"), (64, 0, 0, "blocks"), (64, 1, 64 * 1024, "shared memory")],
)
def test_impossible_launches_are_refused(
    host: HostMachine, block: int, grid: int, shared_floats: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        host.small_kernel("right", block, grid, shared_floats)


def test_shuffles(host: HostMachine) -> None:
    warps = torch.arange(64.0).reshape(2, 32)
    assert torch.equal(host.small_kernel("warp_sum")[:64].reshape(2, 32), warps.sum(1, keepdim=True).expand(2, 32))
    halves = torch.arange(64.0).reshape(4, 16)
    shifted = torch.cat([halves[:, 1:], halves[:, -1:]], 1)
    assert torch.equal(host.small_kernel("shift")[:64].reshape(4, 16), shifted)
