"""What the CUDA graphs of the ConvNet step do where there is no CUDA; test_gpu.py has the rest."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from pydistill.ops._convnet_step_graph import StepGraphs, _Captured
from pydistill.reference.convnet_shape import ConvNetShape


def test_cpu_tensors_are_refused_and_cuda_is_left_alone(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("CUDA was touched")

    for name in ("CUDAGraph", "Stream", "device", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, touched)
    shape = ConvNetShape(3, 8, 8, (4,), 1, 2)
    theta, images, labels = torch.zeros(1, shape.numel), torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    graphs = StepGraphs()
    with pytest.raises(ValueError, match=r"^theta: expected a CUDA tensor, got one on cpu"):
        graphs.gradient(shape, theta, images, labels)
    with pytest.raises(ValueError, match=r"^theta: expected a CUDA tensor"):
        graphs.tangent(shape, theta, theta, images, labels)


def test_a_captured_function_is_warmed_up_and_its_buffers_are_its_own(monkeypatch):
    """With stand-ins for streams and graph that keep a journal: the order of calls, and the copies in and out."""
    journal = []

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: journal.append(f"{name} waits for {other.name}"))

    @contextlib.contextmanager
    def on(stream):
        journal.append(f"on {stream.name}")
        yield
        journal.append(f"off {stream.name}")

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        journal.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")
        yield
        journal.append("captured")

    def replay():
        (x,), (doubled, _) = captured.inputs, captured.outputs
        doubled.copy_(2 * x)

    def double(x):
        journal.append("run")
        return 2 * x, None

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "memory_reserved", iter([100, 164]).__next__)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))

    first, second = torch.ones(3), torch.full((3,), 5.0)
    pool = SimpleNamespace(handle="pool", nbytes=5)
    captured = _Captured(double, (first,), pool, stream("side"))
    assert pool.nbytes == 5 + 64  # what was reserved meanwhile
    assert journal == [
        *("side waits for current", "on side", "run", "run", "run", "off side", "current waits for side"),
        *("capture into pool on side, thread_local", "run", "captured"),
    ]
    one, nothing = captured((first,))
    two, _ = captured((second,))
    assert nothing is None
    assert torch.equal(one, 2 * first)
    assert torch.equal(two, 2 * second)
    assert torch.equal(first, torch.ones(3))
