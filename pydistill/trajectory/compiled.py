"""Students that are any module, with the step traced to one graph and compiled.

The derivative itself is compiled. A step's gradient is reverse mode, and its adjoint is forward mode over that: along
a direction nu of the parameters, the derivatives of the loss, of its gradient in theta and of that in the images are
<g, nu>, H nu and d<g, nu>/dx, since second derivatives are symmetric. Forward mode uses convolutions of the usual
shapes only, whereas the double backward of a convolution swaps batch and channels, and it gives <g, nu> without g.

`make_fx` records both as graphs of plain operators, with nothing left to differentiate, for `torch.compile`. A graph
is what the module did once, on tensors without values: branches on values stop the trace; a module that draws at
random, keeps values on itself or has hooks is refused; and the first call of every graph is compared with autograd.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from pydistill.trajectory.generic import GenericStudents, stacked
from pydistill.trajectory.step import Adjoint, Batch, Descent, of_student
from pydistill.trajectory.step_graph import Untraceable, traced
from pydistill.trajectory.written_out import WrittenOut

_log = logging.getLogger("pydistill")

_MAX_STEPS = 32  # graphs that are kept

# relative L2 distances from autograd up to which a graph counts as the same
_TOLERANCES = {torch.float32: 2e-2, torch.float64: 1e-8}
_COARSE = 0.3  # in bf16; up to here, float32 errors are checked in float64


class _Given(NamedTuple):
    """The arguments of a graph."""

    theta: Tensor
    direction: Tensor | None  # of an adjoint
    x: Tensor
    y: Tensor
    buffers: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        directions = () if self.direction is None else (self.direction,)
        return [t.detach() for t in (self.theta, *directions, self.x, self.y, *self.buffers.values())]

    def double(self) -> _Given:
        def wide(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        direction = None if self.direction is None else wide(self.direction)
        buffers = {name: wide(b) for name, b in self.buffers.items()}
        return _Given(wide(self.theta), direction, wide(self.x), wide(self.y), buffers)


class CompiledStudents(GenericStudents):
    """Any module whose step can be traced, one student after the other, each step a compiled graph."""

    def gradient(
        self,
        theta: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        keep: int | None,
        *,
        with_logits: bool = False,
    ) -> Descent:
        found = []
        for e, row in enumerate(theta):
            x, y = of_student(batch, e)
            own = dict(self.flat.net.named_buffers()) if buffers is None else buffers
            step, unused = self._step("gradient", _Given(row, None, x, y, own), ())
            loss, grad, logits, *after = step(row.detach(), x.detach(), y.detach(), *own.values())
            with torch.no_grad():
                for buffer, value in zip(own.values(), after, strict=True):
                    buffer.copy_(value)
            found.append((loss, grad, logits, unused))
        losses, grads, outputs, all_unused = zip(*found, strict=True)
        return Descent(stacked(losses), stacked(grads), stacked(outputs) if with_logits else None, all_unused)

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
        wanted = tuple(name for name, on in (("curvature", curvature), ("images", images), ("labels", labels)) if on)
        found = []
        for e, row in enumerate(theta):
            x, y = of_student(batch, e)
            own = dict(self.flat.net.named_buffers()) if buffers is None else buffers
            step, _ = self._step("adjoint", _Given(row, direction[e], x, y, own), wanted)
            slope, *parts = step(row.detach(), direction[e].detach(), x.detach(), y.detach(), *own.values())
            found.append((slope, *(part * scale[e] for part in parts)))
        joined = dict(zip(("slope", *wanted), (stacked(parts) for parts in zip(*found, strict=True)), strict=True))
        return Adjoint(joined["slope"], joined.get("curvature"), joined.get("images"), joined.get("labels"))

    def _step(self, kind: str, given: _Given, wanted: tuple[str, ...]) -> _Step:
        """The compiled graph for arguments like these."""
        arguments, device = given.tensors(), given.x.device.type
        signature = (
            *(kind, wanted, _structure(self.flat.net), self.label_kind, self.output, self.precision),
            *((t.shape, t.dtype, t.device) for t in arguments),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
        )
        if signature in _steps:
            _steps.move_to_end(signature)
            return _steps[signature]
        started = time.perf_counter()
        graph = self._graph_of(kind, given, wanted)
        traced = time.perf_counter() - started
        step = torch.compile(graph, fullgraph=True, dynamic=False)
        with torch.no_grad():
            found = step(*[t.clone() for t in arguments])
        took = time.perf_counter() - started
        nodes = len(graph.graph.nodes)
        _log.info("compiled engine: %s of %d operators traced in %.1f s, compiled in %.1f s", kind, nodes, traced, took)
        unused = self._compare(kind, found, given, wanted)

        def run(*arguments: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return step(*arguments)

        _steps[signature] = run, unused
        if len(_steps) > _MAX_STEPS:
            _steps.popitem(last=False)
        return run, unused

    def _graph_of(self, kind: str, given: _Given, wanted: tuple[str, ...]) -> fx.GraphModule:
        """In channels-last, or as it comes where torch's forward mode cannot take a view of that."""
        for memory_format in (torch.channels_last, torch.contiguous_format):
            gradient = kind == "gradient"
            make = self._gradient_of if gradient else partial(self._adjoint_of, wanted=wanted)
            function = make(given.buffers, partial(_laid_out, memory_format))
            try:
                with _watched(self.flat.net), torch.enable_grad():
                    return traced(function, given.tensors(), None if gradient else 1)
            except Untraceable as error:
                reason = error
        raise ValueError(f"engine: expected a net that can be traced to be compiled, but {reason}") from reason

    def _gradient_of(
        self, buffers: dict[str, Tensor], lay_out: Callable[[Tensor], Tensor]
    ) -> Callable[..., list[Tensor]]:
        def gradient(theta: Tensor, x: Tensor, y: Tensor, *own: Tensor) -> list[Tensor]:
            x, parameters = lay_out(x), self._parts(theta, lay_out)
            grads, (loss, (logits, after)) = torch.func.grad_and_value(self._traceable_loss(buffers), has_aux=True)(
                parameters, x, y, own
            )
            return [loss, self._joined(grads), logits, *after]

        return gradient

    def _adjoint_of(
        self, buffers: dict[str, Tensor], lay_out: Callable[[Tensor], Tensor], wanted: tuple[str, ...]
    ) -> Callable[..., list[Tensor]]:
        places = {"curvature": 0, "images": 1, "labels": 2}
        argnums = tuple(places[name] for name in wanted)

        def adjoint(theta: Tensor, direction: Tensor, x: Tensor, y: Tensor, *own: Tensor) -> list[Tensor]:
            x = lay_out(x)
            loss_of = self._traceable_loss(buffers)

            def at(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple]:
                if not argnums:
                    return loss_of(parameters, x, y, own)[0], ()
                grads, (loss, _) = torch.func.grad_and_value(loss_of, argnums, has_aux=True)(parameters, x, y, own)
                return loss, grads

            parameters, along = (self._parts(t, lay_out) for t in (theta, direction))
            slope, grads = torch.func.jvp(at, (parameters,), (along,))[1]
            parts = dict(zip(wanted, grads, strict=True))
            if "curvature" in parts:
                parts["curvature"] = self._joined(parts["curvature"])
            return [slope, *(part.contiguous() for part in parts.values())]

        return adjoint

    def _traceable_loss(self, buffers: dict[str, Tensor]) -> Callable[..., tuple[Tensor, tuple]]:
        """(parameters, x, y, buffers) -> loss, (logits, the buffers after it)."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, tuple]:
            after = {name: b.clone() for name, b in zip(buffers, own, strict=True)}  # for the module to change
            with WrittenOut():
                logits = self._checked(lambda: self.flat.at(parameters, x, buffers=after), x)
                found = self._loss(logits, y)
            return found, (logits, list(after.values()))

        return loss

    def _parts(self, theta: Tensor, lay_out: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: lay_out(p) for name, p in self.flat.unflatten(theta).items()}

    def _joined(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads[name].reshape(-1) for name in self.flat.names])

    def _compare(self, kind: str, found: Sequence[Tensor], given: _Given, wanted: tuple[str, ...]) -> frozenset[str]:
        """The parameters that the loss does not use. Raises unless the graph agrees with autograd on the step.

        In float32, one ReLU or max pool that rounding tips the other way shows in all of a small batch's gradients. So
        what is off by more than rounding, but not by much, is compiled and compared again in float64.
        """
        name, error, unused = self._furthest(kind, found, given, wanted)
        dtype = given.theta.dtype
        tolerance = _COARSE if self.precision == "bf16" else _TOLERANCES.get(dtype, _COARSE)
        if dtype == torch.float32 and tolerance < error <= _COARSE:
            wide = given.double()
            step = torch.compile(self._graph_of(kind, wide, wanted), fullgraph=True, dynamic=False)
            with torch.no_grad():
                found = step(*wide.tensors())
            name, error, _ = self._furthest(kind, found, wide, wanted)
            tolerance = _TOLERANCES[torch.float64]
        if not error <= tolerance:
            raise ValueError(
                f"engine: expected a net whose compiled step computes what the net does, but {name} of the "
                f"{kind} is {error:.2g} off"
            )
        return unused

    def _furthest(
        self, kind: str, found: Sequence[Tensor], given: _Given, wanted: tuple[str, ...]
    ) -> tuple[str, float, frozenset[str]]:
        """What in ``found`` is furthest from autograd's, its relative distance, and the unused parameters."""
        batch, rows = Batch(given.x.detach(), given.y.detach(), False), given.theta.detach()[None]
        own = {name: b.clone() for name, b in given.buffers.items()}
        unused: frozenset[str] = frozenset()
        names: tuple[str, ...]
        if kind == "gradient":
            descent = GenericStudents.gradient(self, rows, batch, own, None, with_logits=True)
            assert descent.logits is not None
            names = ("losses", "grad", "logits", *own)
            truths = [descent.losses[0], descent.grad[0], descent.logits[0], *own.values()]
            unused = descent.unused[0]
        else:
            assert given.direction is not None
            direction, one = given.direction.detach()[None], given.theta.new_ones(1)
            options = {name: name in wanted for name in ("curvature", "images", "labels")}
            adjoint = GenericStudents.adjoint(self, rows, direction, one, batch, own, None, **options)
            names = ("slope", *wanted)
            truths = [getattr(adjoint, name)[0] for name in names]
        furthest, most = names[0], 0.0
        for name, value, true in zip(names, found, truths, strict=True):
            value, true = value.double(), true.double()
            error, size = float((value - true).norm()), float(true.norm())
            if name == "slope":  # its terms may cancel
                size = max(size, 1e-3 * float(direction.norm()))
            if error == 0 or not bool(true.isfinite().all()):
                continue
            relative = error / size if size else float("inf")
            if relative > most or relative != relative:
                furthest, most = name, relative
            if most != most:  # nothing is further than NaN
                break
        return furthest, most, unused


_Step = tuple[Callable[..., list[Tensor]], frozenset[str]]  # with the parameters that its loss does not use

_steps: OrderedDict[tuple, _Step] = OrderedDict()


def _laid_out(memory_format: torch.memory_format, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def _structure(net: nn.Module) -> tuple:
    """All that the module's forward can depend on besides its tensors' values."""
    found = []
    places: dict[int, int] = {}

    def place(thing: Any) -> int:  # shared things have one place
        return places.setdefault(id(thing), len(places))

    for name, module in net.named_modules(remove_duplicate=False):
        if _hooks_of(module):
            raise ValueError(f"engine: expected a net without hooks, but {type(module).__name__} {name!r} has some")
        own = vars(module)
        plain = tuple((key, _plain(value)) for key, value in own.items() if key not in _TORCHS_OWN)
        tensors = tuple(
            (key, None if value is None else (place(value), value.shape, value.dtype, value.requires_grad))
            for kind in ("_parameters", "_buffers")
            for key, value in own[kind].items()
        )
        found.append((name, place(module), type(module), type(module).forward, plain, tensors))
    return tuple(found)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}


def _hooks_of(module: nn.Module) -> bool:
    everywhere = nn.modules.module
    return any(getattr(module, kind) for kind in _HOOKS) or any(
        (
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_plain(each) for each in value)
    if isinstance(value, dict):
        return dict, tuple((key, _plain(each)) for key, each in value.items())
    if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
        return value  # the key keeps it alive, so that its address is not reused
    raise ValueError(
        f"engine: expected a net whose modules keep tensors, numbers and strings alone, but one keeps a "
        f"{type(value).__name__}"
    )


def _global_draws() -> tuple:
    """The states of Python's and numpy's generators."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
    return random.getstate(), name, keys.tobytes(), *rest


@contextmanager
def _watched(net: nn.Module) -> Iterator[None]:
    """Refuse a forward that changes its module or draws numbers: a graph would do so once and never again."""
    before = {module: dict(vars(module)) for module in net.modules()}
    sources = _global_draws()
    try:
        yield
        for module, own in before.items():
            changed = [
                name
                for name in {**own, **vars(module)}
                if name not in _TORCHS_OWN and own.get(name) is not vars(module).get(name)
            ]
            if changed:
                raise ValueError(
                    f"engine: expected a net that keeps nothing, but {type(module).__name__} changes {changed[0]!r}"
                )
        if _global_draws() != sources:
            raise ValueError("engine: expected a net that draws no random numbers to be compiled")
    finally:
        for module, own in before.items():
            vars(module).update(own)
            for name in set(vars(module)) - set(own):
                del vars(module)[name]
