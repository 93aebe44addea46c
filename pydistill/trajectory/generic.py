"""Students that are any module: a step by autograd.

Two things make it cheaper than the same loop by hand. Convolutions, and group norms with one group per channel, run on
operators whose second derivative takes ordinary convolutions and one pass over memory. And the last steps, as many as
a budget allows, keep their graphs for the reverse sweep, which then need not run them again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pydistill.ops._precision import Resolved, rounded
from pydistill.ops.conv2d import conv2d
from pydistill.ops.convnet_step import LabelKind
from pydistill.ops.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.memory import KeptSteps, Memory, room_for_steps
from pydistill.trajectory.step import Adjoint, Batch, Descent, check_classes, of_student

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Students = TypeVar("_Students", bound="GenericStudents")


def _rounding(
    method: Callable[Concatenate[_Students, Tensor, _Arguments], _Result],
) -> Callable[Concatenate[_Students, Tensor, _Arguments], _Result]:
    """``method`` of students and theta, with torch's switches as their precision says."""

    @functools.wraps(method)
    def run(self: _Students, theta: Tensor, *args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with rounded(self.precision, theta.device):
            return method(self, theta, *args, **options)

    return run


class _Graph(NamedTuple):
    """A student's step whose gradient can be differentiated: its leaves and that gradient."""

    theta: Tensor
    images: Tensor
    labels: Tensor
    grad: Tensor


class GenericStudents:
    """Any module, by autograd, one student after the other."""

    def __init__(
        self, flat: FlatModule, label_kind: LabelKind, output: int | None, largest_label: int, precision: Resolved
    ):
        self.flat, self.label_kind, self.output = flat, label_kind, output
        self.largest_label, self.precision = largest_label, precision
        self.graphs: dict[int, list[_Graph]] = {}
        self._room, self._steps, self._first = 0, 0, 0
        self._kept = KeptSteps()
        self._first_kept: int | None = 0  # None: not known yet
        self._moving = (False, False)

    def plan(
        self,
        memory: Memory,
        steps: int,
        stored: int,
        device: torch.device,
        first: int = 0,
        *,
        images: bool,
        labels: bool,
    ) -> None:
        """Steps from ``first`` on, the last first, keep their graphs within ``memory``; ``stored``: bytes of parameters
        the unroll keeps.

        The size of a graph is known after the first step. ``images``, ``labels``: whether to differentiate in these.
        """
        self._kept = memory if isinstance(memory, KeptSteps) else KeptSteps()
        self._steps, self._first, self._moving = steps, first, (images, labels)
        if self._kept.number is None:
            self._room = room_for_steps(memory, device, stored, "; store_every keeps fewer parameters")
            self._first_kept = None
        else:
            self._first_kept = max(first, steps - self._kept.number)

    @_rounding
    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """[E, B, K], with the module in the mode it is in."""
        rows = images if images.dim() == 5 else [images] * len(theta)
        return torch.stack([self._logits(row, x) for row, x in zip(theta, rows, strict=True)])

    def in_evaluation(self) -> GenericStudents:
        """The same students: the module's mode decides."""
        return self

    def _logits(self, theta: Tensor | dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """theta as a vector, or what `FlatModule.unflatten` makes of it."""
        if isinstance(theta, Tensor):
            return self._checked(lambda: self.flat(theta, x, buffers=buffers), x)
        return self._checked(lambda: self.flat.at(theta, x, buffers=buffers), x)

    def _checked(self, forward: Callable[[], Any], x: Tensor) -> Tensor:
        """The net's ``forward`` of x, as logits."""
        half = self.precision == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext():
            logits = forward()
        if self.output is not None:
            if isinstance(logits, Tensor):
                raise ValueError(f"output: expected None for a net that returns a tensor, got {self.output}")
            try:
                logits = logits[self.output]
            except IndexError:
                raise ValueError(f"output: expected an element of {len(logits)}, got {self.output}") from None
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"net: its forward returned a {type(logits).__name__}, expected a tensor of logits; "
                "output=i takes element i of a tuple"
            )
        if logits.dim() != 2 or len(logits) != len(x):
            raise ValueError(f"net: expected logits [{len(x)}, K], got shape {list(logits.shape)}")
        return logits.float() if half else logits

    def loss(
        self, theta: Tensor | dict[str, Tensor], x: Tensor, y: Tensor, buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """One student's: theta [P], or unflattened, x [B, C, H, W]."""
        return self._loss(self._logits(theta, x, buffers), y)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the generic engine takes gradients, which torch.inference_mode() rules out; torch.no_grad() does not"
            )
        check_classes(self.label_kind, self.largest_label, y, logits.shape[1])
        return F.cross_entropy(logits, y.softmax(-1) if self.label_kind == "logits" else y)

    @_rounding
    def gradient(
        self,
        theta: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        keep: int | None,
        *,
        with_logits: bool = False,
    ) -> Descent:
        found: list[tuple[Tensor, Tensor, frozenset[str], Tensor]] = []
        graphs: list[_Graph] = []
        for e, row in enumerate(theta):
            x, y = (t.detach() for t in of_student(batch, e))
            if keep is not None and (self._first_kept is None or keep >= self._first_kept):
                measured = self._first_kept is None
                with _saved_bytes(measured) as saved:
                    graph, loss, unused, logits = self._graph(row, x, y, buffers, *self._moving)
                if self._first_kept is None:
                    number = min(self._room // max(1, len(theta) * saved()), self._steps - self._first)
                    self._kept.number = number
                    self._first_kept = self._steps - number
                if keep >= self._first_kept:
                    graphs.append(graph)
                found.append((loss, graph.grad.detach(), unused, logits))
                continue
            with torch.enable_grad():
                named = {name: part.requires_grad_() for name, part in self.flat.unflatten(row.detach()).items()}
                logits = self._logits(named, x, buffers)
                loss = self._loss(logits, y)
                found.append((loss.detach(), *flat_gradient(loss, named), logits.detach()))
        if keep is not None and graphs:
            self.graphs[keep] = graphs
        losses, grads, all_unused, outputs = zip(*found, strict=True)
        all_logits = torch.stack(outputs) if with_logits else None
        return Descent(torch.stack(losses), torch.stack(grads), all_logits, all_unused)

    def _graph(
        self, theta: Tensor, x: Tensor, y: Tensor, buffers: dict[str, Tensor] | None, images: bool, labels: bool
    ) -> tuple[_Graph, Tensor, frozenset[str], Tensor]:
        """One student's step, its loss, the parameters that it does not use, and its logits."""
        with torch.enable_grad(), _TwiceDifferentiable():
            row, x, y = theta.detach().requires_grad_(), x.detach().requires_grad_(images), y.detach()
            if labels:
                y.requires_grad_()
            named = self.flat.unflatten(row)
            logits = self._logits(named, x, buffers)
            loss = self._loss(logits, y)
            grad, unused = flat_gradient(loss, named, create_graph=True)
        return _Graph(row, x, y, grad), loss.detach(), unused, logits.detach()

    @_rounding
    def penalty_gradient(self, theta: Tensor, images: Tensor, buffers: dict[str, Tensor] | None) -> Tensor:
        """[E, P]: gradient of mean((||d sum(logits) / d images||_2 over channels - 1)^2); images [E, B, C, H, W]."""
        found: list[Tensor] = []
        for row, x in zip(theta, images, strict=True):
            with torch.enable_grad():
                row, x = row.detach().requires_grad_(), x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._logits(row, x, buffers).sum(), x, create_graph=True)
                penalty = (torch.linalg.vector_norm(slope, dim=1) - 1).square().mean()
                curved = penalty.requires_grad  # not if the slope is the same at every theta
                found += (
                    torch.autograd.grad(penalty, row, materialize_grads=True) if curved else [torch.zeros_like(row)]
                )
        return torch.stack(found)

    @_rounding
    def adjoint(
        self,
        theta: Tensor,
        direction: Tensor,
        scale: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        kept: int | None,
        *,
        curvature: bool,
        images: bool,
        labels: bool,
    ) -> Adjoint:
        found, graphs = [], self.graphs.pop(kept, None) if kept is not None else None
        for e, row in enumerate(theta):
            if graphs is None:
                graph, *_ = self._graph(row, *of_student(batch, e), buffers, images, labels)
            else:
                graph = graphs.pop(0)  # freed once it is differentiated
            wanted = {"curvature": graph.theta} if curvature else {}
            wanted |= {"images": graph.images} if images else {}
            wanted |= {"labels": graph.labels} if labels else {}
            if wanted and graph.grad.requires_grad:
                derivatives = torch.autograd.grad(
                    graph.grad, list(wanted.values()), direction[e], allow_unused=True, materialize_grads=True
                )
                parts = [part * scale[e] for part in derivatives]  # not in place: they might be the direction itself
            else:  # a loss linear in theta: nothing depends on anything
                parts = [torch.zeros_like(t) for t in wanted.values()]
            slope = torch.dot(graph.grad.detach(), direction[e])
            found.append({"slope": slope, **dict(zip(wanted, parts, strict=True))})
        joined = {name: stacked([f[name] for f in found]) for name in found[0]}
        return Adjoint(joined["slope"], joined.get("curvature"), joined.get("images"), joined.get("labels"))


def flat_gradient(loss: Tensor, named: dict[str, Tensor], create_graph: bool = False) -> tuple[Tensor, frozenset[str]]:
    """The gradient in the named parameters as one vector [P], zero for those that ``loss`` does not use, and the names
    of those."""
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=create_graph, allow_unused=True)
    found = dict(zip(named, grads, strict=True))
    parts = [torch.zeros_like(named[name]) if grad is None else grad for name, grad in found.items()]
    return torch.cat([part.reshape(-1) for part in parts]), frozenset(n for n, grad in found.items() if grad is None)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, without a copy where there is only one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


@contextlib.contextmanager
def _saved_bytes(count: bool) -> Iterator[Callable[[], int]]:
    """Yields a function that gives the bytes of tensors autograd has saved in the block; counts only if ``count``."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks if count else contextlib.nullcontext():
        yield lambda: sum(sizes.values())


class _TwiceDifferentiable(TorchFunctionMode):
    """Convolutions and instance norms on our operators, whose second derivatives are faster."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d:
            return _convolution(*args, **kwargs)
        if function is F.group_norm:
            return _group_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    sizes = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    plain = all(isinstance(v, (tuple, list)) and len(v) == 2 for v in sizes) and input.dim() == 4
    op = conv2d if plain and type(input) is Tensor else torch.conv2d
    return op(input, weight, bias, stride, padding, dilation, groups)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    plain = type(input) is Tensor and input.dim() == 4 and input.device.type == "cpu" and min(input.shape) > 0
    plain = plain and num_groups == input.shape[1] and input.dtype in (torch.float32, torch.float64)
    if plain and weight is not None and bias is not None and weight.dtype == bias.dtype == input.dtype:
        return instance_norm_relu_avg_pool(input, weight, bias, eps=eps, relu=False, pool=False)
    return F.group_norm(input, num_groups, weight, bias, eps)
