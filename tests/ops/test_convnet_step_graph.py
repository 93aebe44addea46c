"""What the CUDA graphs of the ConvNet step do where there is no CUDA; test_gpu.py has the rest."""

import pytest
import torch

from pydistill.ops._convnet_shape import ConvNetShape
from pydistill.ops._convnet_step_graph import StepGraphs


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
