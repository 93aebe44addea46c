"""The layer-by-layer ConvNet step as CUDA graphs: a few dozen launches replayed as one.

At the sizes of dataset distillation a step's kernels are short, and launching them one by one from Python takes longer
than running them. Only a CUDA device can run this, so it is not executed in CI; the `gpu` tests check it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydistill.ops import _convnet_step_layers as layers
from pydistill.ops._convnet_step_layers import LabelKind, Precision
from pydistill.reference.convnet_shape import ConvNetShape

# torch captures on its own stream; libraries must have done their first-call setup before
_WARM_UP = 3


class StepGraphs:
    """`gradient` and `tangent` of `_convnet_step_layers`, captured at the first call of each signature, then replayed.

    A signature is the net's shape, the tensors' shapes, dtypes and device, the label kind and the precision. Inputs
    are copied into the graph's own buffers and results out of them, so that the next step does not change a result.
    All graphs of an instance share one memory pool, because no two of them run at the same time:
    use an instance from one thread, and with one stream at a time. Memory is freed with the instance.

    Raises:
        ValueError: theta is not a CUDA tensor.
        TypeError, ValueError: as in `_convnet_step_layers`, at the first call of a signature.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple, _Captured] = {}
        self._pools: dict[torch.device, Any] = {}

    def gradient(
        self,
        shape: ConvNetShape,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        *,
        label_kind: LabelKind = "hard",
        precision: Precision = "fp32",
    ) -> tuple[Tensor, Tensor]:
        """See `_convnet_step_layers.gradient`."""
        return self._run(layers.gradient, shape, (theta, images, labels), label_kind, precision)

    def tangent(
        self,
        shape: ConvNetShape,
        theta: Tensor,
        direction: Tensor,
        images: Tensor,
        labels: Tensor,
        *,
        label_kind: LabelKind = "hard",
        precision: Precision = "fp32",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `_convnet_step_layers.tangent`."""
        return self._run(layers.tangent, shape, (theta, direction, images, labels), label_kind, precision)

    @torch.no_grad()
    def _run(
        self,
        function: Callable[..., tuple],
        shape: ConvNetShape,
        tensors: tuple[Tensor, ...],
        label_kind: LabelKind,
        precision: Precision,
    ) -> tuple:
        device = tensors[0].device
        if device.type != "cuda":
            raise ValueError(f"theta: expected a CUDA tensor, got one on {device}")
        signature = tuple((t.shape, t.dtype, t.device) for t in tensors)
        key = (function.__name__, shape, label_kind, precision, signature)
        with torch.cuda.device(device):
            if key not in self._steps:
                if device not in self._pools:
                    self._pools[device] = torch.cuda.graph_pool_handle()
                options = {"label_kind": label_kind, "precision": precision}
                self._steps[key] = _Captured(
                    lambda *inputs: function(shape, *inputs, **options), tensors, self._pools[device]
                )
            return self._steps[key](tensors)


class _Captured:
    """One function of tensors of fixed shapes, as a CUDA graph on the current device."""

    def __init__(self, function: Callable[..., tuple], tensors: tuple[Tensor, ...], pool: Any):
        # outside the pool: other graphs' intermediate results must not overlap an input
        self.inputs = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function(*self.inputs)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            # kept alive, so that no later graph of the pool reuses their memory
            self.outputs = function(*self.inputs)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(None if out is None else out.clone() for out in self.outputs)
