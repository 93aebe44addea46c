"""The stand-in itself: what is counted, what is forbidden, and graphs.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.stand_in.counts import counts, no_waits

M = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (lambda m: m.add(1).sum(), []),
        (lambda m: torch.full((2,), 3.0, device=m.device), []),
        (lambda m: m + torch.tensor(2.0), []),
        (lambda m: m.index_select(0, torch.arange(2, device=m.device)), []),
        (lambda m: m.masked_fill_(m > 0, 1.0), []),
        (lambda m: m.sum().item(), ["_local_scalar_dense"]),
        (lambda m: float(m.sum()), ["_local_scalar_dense"]),
        (lambda m: bool((m > 0).all()), ["_local_scalar_dense"]),
        (lambda m: m.nonzero(), ["nonzero"]),
        (lambda m: m[m > 0], ["nonzero"]),
        (lambda m: m.unique(), ["_unique2"]),
        (lambda m: m[torch.tensor([1])], ["copy from host"]),
        (lambda m: m.cpu(), ["copy to host"]),
        (lambda m: m.tolist(), ["copy to host"]),
        (lambda m: m.to("cpu", non_blocking=True), []),  # torch pins what it makes for that
        (lambda m: torch.empty(6, 6).copy_(m, non_blocking=True), ["copy to host"]),
        (lambda m: m.to("cuda:1"), []),
        (lambda m: torch.tensor([1.0], device=m.device), ["copy from host"]),
        (lambda m: torch.ones(3).to(m.device, non_blocking=True), ["copy from host"]),
        (lambda m: torch.ones(3).pin_memory().to(m.device), ["copy from host"]),
        (lambda m: torch.ones(3).pin_memory().to(m.device, non_blocking=True), []),
        (lambda m: torch.empty(6, 6, pin_memory=True).copy_(m, non_blocking=True), []),
        (lambda m: torch.repeat_interleave(torch.ones(6, device=m.device).long()), ["repeat_interleave"]),
        (lambda m: torch.linalg.cholesky(m @ m.T + torch.eye(6, device=m.device)), ["_local_scalar_dense"]),
        (lambda m: torch.linalg.eigh(m + m.T), ["_linalg_eigh"]),
        (lambda m: torch.cuda.synchronize(), ["synchronize"]),
        (lambda m: torch.cuda.current_stream().synchronize(), ["Stream.synchronize"]),
    ],
)
def test_waits(function: Callable[[Tensor], Any], reasons: list[str]) -> None:
    m = M.cuda()
    with counts() as c:
        function(m)
    assert c.waits == reasons
    if reasons:
        with pytest.raises(RuntimeError, match=f"the host waits for the device: {reasons[0]}"), no_waits():
            function(m)
    else:
        with no_waits():
            function(m)


@pytest.mark.parametrize(
    ("function", "launches", "copies", "allocations"),
    [
        (lambda m: m.add(1).sum(), 2, 0, 2),
        (lambda m: m.add_(1).t()[:2].unsqueeze(0).expand(3, 2, 6), 1, 0, 0),
        (lambda m: torch.empty_like(m), 0, 0, 1),
        (lambda m: torch.zeros_like(m), 1, 0, 1),
        (lambda m: m.to("cpu"), 0, 1, 0),
        (lambda m: M.to(m.device), 0, 1, 1),
        (lambda m: m.clone(), 1, 0, 1),
        (lambda m: m.sum().item(), 1, 0, 1),
        (lambda m: F.log_softmax(m, 1), 1, 0, 1),
        (lambda m: torch._foreach_add_([m, m.t()], 1.0), 1, 0, 0),
        (lambda m: torch.ops.stand_in_foreign.twice(m), 1, 0, 1),
    ],
)
def test_launches_copies_and_allocations(
    function: Callable[[Tensor], Any], launches: int, copies: int, allocations: int
) -> None:
    torch.use_deterministic_algorithms(False)  # it fills what empty() returns
    m = M.cuda()
    with counts() as c:
        function(m)
    assert (c.launches, c.copies, c.allocations) == (launches, copies, allocations)


def test_a_backward_pass_is_counted() -> None:
    x = M.cuda().requires_grad_()
    loss = x.square().sum()
    with counts() as c:
        loss.backward()
    assert c.launches >= 2
    assert c.waits == []


def captured(function: Callable[[], Any], **options: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        function()
    return graph


def test_a_graph_runs_again_what_was_recorded_in_its_buffers() -> None:
    x, total, out = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), []

    def step() -> None:
        assert torch.cuda.is_current_stream_capturing()
        y = (torch.ops.stand_in_foreign.twice(x) * 2).view(3, 1)
        total.add_(y.view(3))
        out.append(y + 1)

    with counts() as c:
        graph = captured(step, pool=torch.cuda.graph_pool_handle())
    assert (c.captures, c.replays) == (1, 0)
    assert out[0].isnan().all()
    assert not total.any()
    buffer = out[0].data_ptr()
    with counts() as c:
        for value in (1, 5):
            x.fill_(value)
            graph.replay()
    assert (c.captures, c.replays, c.launches) == (0, 2, 2)
    assert out[0].tolist() == [[21.0]] * 3
    assert total.tolist() == [24.0] * 3
    assert out[0].data_ptr() == buffer


def test_a_graph_draws_anew_in_each_replay() -> None:
    own = torch.Generator("cuda").manual_seed(4)
    drawn, graph = [], torch.cuda.CUDAGraph()
    graph.register_generator_state(own)
    before = torch.cuda.get_rng_state()
    with torch.cuda.graph(graph):
        drawn += [torch.rand(2, device="cuda"), torch.rand(2, device="cuda", generator=own)]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    graph.replay()
    first = [d.clone() for d in drawn]
    graph.replay()
    assert not any(map(torch.equal, first, drawn))
    torch.cuda.set_rng_state(before)
    own.manual_seed(4)
    assert torch.equal(first[0], torch.rand(2, device="cuda"))
    assert torch.equal(first[1], torch.rand(2, device="cuda", generator=own))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum().item(), "capturing: _local_scalar_dense"),
        (lambda x: torch.tensor([1.0], device="cuda"), "capturing: copy from host"),
        (lambda x: torch.cuda.synchronize(), "capturing: synchronize"),
        (lambda x: torch.zeros(3, device="cuda:1"), "on cuda:1, while a stream of cuda:0 is capturing"),
        (lambda x: torch.empty(3, device="cuda:1"), "an allocation outside of the graph's pool"),
        (lambda x: torch.rand(3, device="cuda", generator=torch.Generator("cuda")), "generator that is not registered"),
        (lambda x: on_another_stream(x), "on another stream"),
        (lambda x: on_another_stream(x, torch.ops.stand_in_foreign.twice), "on another stream"),
    ],
)
def test_what_is_illegal_while_a_graph_is_captured(function: Callable[[Tensor], Any], message: str) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        captured(lambda: function(x))
    assert x.sum().item() == 3  # nothing is capturing any more


@pytest.mark.parametrize(("mode", "refused"), [("global", True), ("thread_local", False)])
def test_captures_and_other_threads(mode: str, refused: bool) -> None:
    x, found = torch.ones(3, device="cuda"), []

    def other() -> None:
        try:
            found.append((x + torch.zeros(3, device="cuda")).tolist())
        except RuntimeError as error:
            found.append(str(error))

    def step() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    captured(step, capture_error_mode=mode)
    assert ("capturing" in found[0]) == refused


def on_another_stream(x: Tensor, function: Callable[[Tensor], Tensor] = torch.neg) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        function(x)


def test_a_capture_needs_a_stream_beside_the_default_one() -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
