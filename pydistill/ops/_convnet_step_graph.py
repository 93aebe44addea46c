"""The layer-by-layer ConvNet step as CUDA graphs: a few dozen launches replayed as one.

At the sizes of dataset distillation a step's kernels are short, and launching them one by one from Python takes longer
than running them. A capture takes tens of milliseconds, so graphs outlive the call that they were captured for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

from pydistill.ops import _convnet_step_layers as layers
from pydistill.ops._convnet_step_layers import LabelKind
from pydistill.ops._precision import Resolved
from pydistill.reference.convnet_shape import ConvNetShape

# libraries must have done their first-call setup before a capture
_WARM_UP = 3

# what the process keeps beyond the calls that use it
MOST = 64  # graphs
KEPT = 0.25  # of a device's memory, for their inputs and pools

_recent: OrderedDict[tuple, _Captured] = OrderedDict()  # the least recently used one first
_lanes: WeakValueDictionary[tuple[torch.device, int], _Lane] = WeakValueDictionary()
_registry = threading.Lock()  # of these two
_capturing = threading.Lock()  # torch captures one graph at a time


def release_graphs() -> None:
    """Free the CUDA graphs that the student engine keeps from one call to the next, and their memory.

    `pydistill.unroll`, `pydistill.trajectory_match`, `pydistill.trajectory.train_students` and
    `pydistill.matching.class_gradients` capture a step once for each signature: net, shapes, dtypes, device and stream,
    kind of labels, precision. The process keeps the 64 used last, less where these take more than a quarter of the
    device's memory: their inputs, and what torch has reserved for their results and for all that a step needs in
    between, which the graphs of a stream share. Calls that are under way, or wait for their backward pass, keep their
    own, however large. The memory goes back to torch; ``torch.cuda.empty_cache()`` hands it to the device.
    """
    with _registry:
        dropped = list(_recent.values())
        _recent.clear()
    dropped.clear()


_keeping = partial(layers.gradient, keep=True)


class StepGraphs:
    """`gradient` and `tangent` of `_convnet_step_layers`, captured at the first call of each signature, then replayed.

    A signature is the net's shape, the tensors' shapes, dtypes and device, the label kind, the precision and the
    current stream. Inputs are copied into the graph's own buffers and results out of them, so that the next step does
    not change a result. Graphs are the process's; those that an instance has used live as long as it does.

    Raises:
        ValueError: theta is not a CUDA tensor.
        TypeError, ValueError: as in `_convnet_step_layers`, at the first call of a signature.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple, _Captured] = {}

    def gradient(
        self,
        shape: ConvNetShape,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        *,
        label_kind: LabelKind = "hard",
        precision: Resolved = "ieee",
        keep: bool = False,
    ) -> tuple[Tensor, ...]:
        """See `_convnet_step_layers.gradient`."""
        function = _keeping if keep else layers.gradient
        return self._run(function, shape, (theta, images, labels), label_kind, precision)

    def tangent(
        self,
        shape: ConvNetShape,
        theta: Tensor,
        direction: Tensor,
        images: Tensor,
        labels: Tensor,
        *kept: Tensor,
        label_kind: LabelKind = "hard",
        precision: Resolved = "ieee",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `_convnet_step_layers.tangent`."""
        return self._run(layers.tangent, shape, (theta, direction, images, labels, *kept), label_kind, precision)

    @torch.inference_mode(False)  # buffers made in that mode could not be written to outside of it
    @torch.no_grad()
    def _run(
        self,
        function: Callable[..., tuple],
        shape: ConvNetShape,
        tensors: tuple[Tensor, ...],
        label_kind: LabelKind,
        precision: Resolved,
    ) -> tuple:
        device = tensors[0].device
        if device.type != "cuda":
            raise ValueError(f"theta: expected a CUDA tensor, got one on {device}")
        signature = tuple((t.shape, t.dtype, t.device) for t in tensors)
        with torch.cuda.device(device):
            place = (device, torch.cuda.current_stream().cuda_stream)
            cudnn = torch.backends.cudnn.enabled
            key = (function, shape, label_kind, precision, cudnn, *place, signature)
            with _registry:
                lane = _lanes.get(place) or _lanes.setdefault(place, _Lane())
            with lane.lock:
                step = self._steps.get(key)
                if step is None:
                    options = {"label_kind": label_kind, "precision": precision}
                    mine = set(self._steps.values())
                    run = partial(_called, function, shape, options)
                    step = _kept(key, mine, lambda: lane.capture(run, tensors, mine))
                    self._steps[key] = step
                return step(tensors)


def _called(function: Callable[..., tuple], shape: ConvNetShape, options: dict[str, Any], *tensors: Tensor) -> tuple:
    return function(shape, *tensors, **options)


class _Lane:
    """What runs on one stream, one graph after the other, so that all of them share one pool of memory.

    ``lock`` is held from a step's copies into its buffers to the copies of its results: threads may share a stream.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None  # to capture on: its device's, unlike torch's default one
        self._pool: ReferenceType[_Pool] | None = None  # lives as long as one of its graphs

    def capture(self, function: Callable[..., tuple], tensors: tuple[Tensor, ...], mine: set[_Captured]) -> _Captured:
        """On the current device. ``mine``: the graphs that the call already has."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        pool = None if self._pool is None else self._pool()
        # one that is too large comes to an end when it gets no further graphs
        if pool is None or (pool.nbytes > _bound(tensors[0].device) and all(step.pool is not pool for step in mine)):
            pool = _Pool()
            self._pool = ref(pool)
        with _capturing:
            step = _Captured(function, tensors, pool, self._stream)
        step.lane = self
        return step


class _Pool:
    """Memory that graphs of one lane share, for what they compute. torch gets it back with the last of them."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.nbytes = 0


class _Captured:
    """One function of tensors of fixed shapes, as a CUDA graph on the current device."""

    lane: _Lane  # lives as long as one of its graphs

    def __init__(
        self, function: Callable[..., tuple], tensors: tuple[Tensor, ...], pool: _Pool, stream: torch.cuda.Stream
    ):
        self.pool = pool
        # outside the pool: other graphs' intermediate results must not overlap an input
        self.inputs = tuple(t.detach().clone(memory_format=_layout(t)) for t in tensors)
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*self.inputs)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may go on: with the default mode, memory that they ask for would end the capture
        with torch.cuda.graph(self.graph, pool=pool.handle, stream=stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            # kept alive, so that no later graph of the pool reuses their memory
            self.outputs = function(*self.inputs)
            # what other threads reserve meanwhile counts, too
            pool.nbytes += max(0, torch.cuda.memory_reserved() - before)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple:
        torch._foreach_copy_(self.inputs, tensors)  # few launches
        self.graph.replay()
        results = tuple(None if out is None else torch.empty_like(out) for out in self.outputs)
        torch._foreach_copy_(
            [out for out in results if out is not None], [out for out in self.outputs if out is not None]
        )
        return results


def _bound(device: torch.device) -> float:
    return KEPT * torch.cuda.get_device_properties(device).total_memory


def _nbytes(device: torch.device) -> int:
    """Of the inputs and pools of the graphs that the process keeps."""
    steps = [step for step in _recent.values() if step.inputs[0].device == device]
    pools = {step.pool for step in steps}
    return sum(t.nbytes for step in steps for t in step.inputs) + sum(pool.nbytes for pool in pools)


def _layout(tensor: Tensor) -> torch.memory_format:
    """Of its buffer. Activations that a step kept have the layout in which another step would have computed them."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.preserve_format if channels_last else torch.contiguous_format


def _kept(key: tuple, mine: set[_Captured], capture: Callable[[], _Captured]) -> _Captured:
    """The process's graph of this signature, with the lane's lock held; ``mine``: those that the call already has."""
    with _registry:
        step = _recent.get(key)
        if step is not None:
            _recent.move_to_end(key)
            return step
        dropped = _dropped(mine)
    dropped.clear()  # now: a pool of which no graph is left takes no further ones
    step = capture()
    with _registry:
        _recent[key] = step
        dropped = _dropped({step, *mine})
    dropped.clear()
    return step


def _dropped(mine: set[_Captured]) -> list[_Captured]:
    """Takes those used longest ago out of the process's, where they are too many or too large. ``mine`` stay: the call
    holds them. The others are to be freed without the lock."""
    dropped = []
    while len(_recent) > MOST:
        dropped.append(_recent.popitem(last=False)[1])
    for device in {step.inputs[0].device for step in _recent.values()}:
        for key, step in list(_recent.items()):
            if _nbytes(device) <= _bound(device):
                break
            if step.inputs[0].device == device and step not in mine:
                dropped.append(_recent.pop(key))
    return dropped
