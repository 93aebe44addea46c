"""Matches every BatchNorm of a model: what DeepInversion, SRe2L, CDA, DWA and INFER do in hooks."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydistill._arguments import check_choice
from pydistill._renamed import renamed
from pydistill.nn import _what_runs as what_runs
from pydistill.nn._bn_patterns import BATCH_NORMS, Graph, Place
from pydistill.nn._what_runs import Unproven
from pydistill.ops.bn_stat_match import check_frozen, statistics_forward, statistics_of, summed_loss
from pydistill.reference.bn_stat_match import Kind

_log = logging.getLogger("pydistill")
_ALONE = "alone"
_matched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the BatchNorms that have a matcher
_MAX_GRAPHS = 16  # per module


class BNStatMatcher:
    """Attach to ``model``: each call of it then leaves the match of its BatchNorms' inputs for `loss` to sum.

    The model is frozen (``requires_grad_(False)``) and what it computes stays the same. Its ``nn.BatchNorm1d``,
    ``2d`` and ``3d`` run on `pydistill.ops.bn_match_forward`, which reads the input once for output and statistics
    and keeps no copy of it. If a module's own ``forward`` shows that a BatchNorm's output goes only to a ReLU, or to
    a sum that does (torchvision's ``bn1`` and ``bn2``, an ``nn.Sequential``), these run in the same pass, and so does
    a max pooling of square windows after the ReLU of a BatchNorm without a sum (a ResNet's stem). Only torch's own
    modules are fused, and only while they have no hooks. A BatchNorm that is something else (a subclass, a
    ``forward`` set on the instance) runs as it is, and its statistics are gathered by a hook. `report` tells what
    runs how, and why; the logger "pydistill" says it in brief. `remove` restores the model::

        model.eval()
        with BNStatMatcher(model, first=10.0) as matcher:  # or matcher.remove() at the end
            logits = model(images)
            loss = cross_entropy(logits, labels) + 0.01 * matcher.loss()

    A BatchNorm that is called twice in a forward contributes two terms, each with its weight. `loss` refers to the last
    call of ``model`` only: calls of a part of it (``model.features(x)``) gather nothing. Nothing synchronises with the
    device.

    Args:
        model: any module with ``nn.BatchNorm1d``, ``2d`` or ``3d``, or subclasses of them, in evaluation mode.
        w_mean: weight of the means' distance.
        w_var: weight of the variances' distance (DWA's decoupled coefficient).
        first: weight of the first BatchNorm, in the order of ``model.modules()``; SRe2L has 10.
        layer_weights: a weight for each BatchNorm in that order, times ``first`` for the first; all 1 by default.
        kind: "norm" or "sq", as of `pydistill.bn_stat_match`.
        unbiased: see there.
        fuse: whether to look for ReLUs and sums to fuse. For that, forwards of modules that hold BatchNorms themselves
            are traced (`torch.fx`), whenever they are called with other constants or their attributes have changed, and
            the graph runs instead of the forward. This is done only if reading the forward's instructions proves that
            it just calls its children and torch's operators.

    Attributes:
        layers: the names of the BatchNorms, in order.
        fused: for those fused with what follows, by name: "relu", "add, relu" or "relu, max pool".

    Raises:
        TypeError: ``model`` is not a module; later, when the model is copied or pickled with the matcher on it.
        ValueError: no BatchNorm, one in training mode or without running statistics (named), another number of
            ``layer_weights``, another matcher on the model, or a part of it is compiled or scripted.
    """

    @renamed(reduction="kind")
    def __init__(
        self,
        model: nn.Module,
        *,
        w_mean: float = 1.0,
        w_var: float = 1.0,
        first: float = 1.0,
        layer_weights: Sequence[float] | None = None,
        kind: Kind = "norm",
        unbiased: bool = False,
        fuse: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        for name, module in model.named_modules():
            _refuse_compiled(name, module)
        if not found:
            raise ValueError("model: expected at least one BatchNorm to match, got a model without any")
        for name, bn in found.items():
            try:
                check_frozen(bn)
            except ValueError as error:
                raise ValueError(f"model: {name or 'itself'}: {error}") from None
            if bn in _matched:
                raise ValueError(
                    f"model: {name or 'itself'}: it has a BNStatMatcher already; remove that matcher first"
                )
        check_choice("kind", kind, ("norm", "sq"))
        if layer_weights is not None and len(layer_weights) != len(found):
            raise ValueError(f"layer_weights: expected {len(found)}, one for each BatchNorm, got {len(layer_weights)}")
        weights = [1.0] * len(found) if layer_weights is None else [float(w) for w in layer_weights]
        weights[0] *= first

        self.layers = tuple(found)
        self.fused: dict[str, str] = {}
        self._model = model
        self._names: dict[nn.Module, str] = {bn: name for name, bn in found.items()}
        self._why: dict[str, str] = {}  # why nothing was fused, by layer
        self._weights = dict(zip(found.values(), weights, strict=True))
        self._options = (w_mean, w_var, kind, unbiased)
        self._found: list[tuple[nn.Module, Tensor]] = []  # in the last call
        self._calling = self._complete = False
        self._kept: tuple[nn.Module, Tensor, Tensor] | None = None  # of the BatchNorm that is being called
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        self._hooks: list[Any] = []
        self._forwards: list[_Replaced] = []
        try:
            self._attach(fuse)
        except BaseException:
            self.remove()
            raise

    def loss(self) -> Tensor:
        """The sum over the BatchNorms of the last call of the model, each with its weight.

        Raises:
            RuntimeError: the model has not been called yet, its last call failed, or called no BatchNorm.
        """
        if not self._complete or not self._found:
            raise RuntimeError("loss: expected a forward of the model with a BatchNorm in it, got none since attaching")
        w_mean, w_var, kind, _ = self._options
        norms, statistics = zip(*self._found, strict=True)
        weights = [(self._weights[bn] * w_mean, self._weights[bn] * w_var) for bn in norms]
        return summed_loss(statistics, norms, weights, kind)

    def report(self) -> dict[str, str]:
        """How each layer runs, by name: "fused: " and with what, "alone: " or "plain: " and why.

        "alone": a BatchNorm on our kernel, output and statistics in one pass; "plain": one that runs as it is.
        """
        found = {}
        for bn, name in self._names.items():
            why = what_runs.why_not_plain(bn, *BATCH_NORMS)
            if why is not None:
                found[name] = f"plain: {why}"
            elif name in self.fused:
                found[name] = f"fused: {self.fused[name]}"
            else:
                found[name] = f"{_ALONE}: {self._why.get(name, 'the module that it belongs to has not been called')}"
        return found

    def remove(self) -> None:
        """Restore the model, including ``requires_grad``. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for forward in self._forwards:
            forward.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        _matched.difference_update(self._names)
        self._hooks, self._forwards, self._frozen, self._found = [], [], [], []
        self._complete = self._calling = False

    def __enter__(self) -> BNStatMatcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise TypeError(
            "model: a BNStatMatcher is attached to it, and a copy would run on this model's layers; "
            "remove() the matcher before the model is copied or pickled"
        )

    def _attach(self, fuse: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for bn in self._names:
            if what_runs.why_not_plain(bn, *BATCH_NORMS) is None:
                self._forwards.append(_Matched(bn, self))
            self._hooks.append(bn.register_forward_hook(_Gather(self), with_kwargs=True))
        for module in self._model.modules():
            own = [child for child in module.children() if child in self._names]
            if own and fuse:
                self._try_to_fuse(module, own)
        for name in self.layers:
            self._why.setdefault(name, "no forward of a module around it was read" if fuse else "fuse=False")
        _matched.update(self._names)
        self._hooks.append(self._model.register_forward_pre_hook(self._start))
        self._hooks.append(self._model.register_forward_hook(self._end))
        report = self.report()
        plain = {why for why in report.values() if why.startswith("plain")}
        counts = {kind: sum(how.startswith(kind) for how in report.values()) for kind in ("fused", _ALONE, "plain")}
        _log.info(
            "BNStatMatcher: of %d BatchNorms %d run fused with what follows, %d alone, %d as they are%s",
            *(len(report), *counts.values(), f" ({'; '.join(sorted(plain))})" if plain else ""),
        )

    def _try_to_fuse(self, module: nn.Module, own: Sequence[nn.Module]) -> None:
        try:
            forward = _Fused(module, self)
        except Unproven as error:
            for bn in own:
                self._why.setdefault(self._names[bn], f"{type(module).__name__}.forward: {error}")
        else:
            self._forwards.append(forward)
            forward.expect()

    def _tell(self, graph: Graph) -> None:
        self.fused |= {self._names[bn]: what for bn, what in graph.fused.items()}
        self._why |= {self._names[bn]: why for bn, why in graph.left.items()}

    def _start(self, model: nn.Module, _: Any) -> None:
        if model is not self._model:
            raise RuntimeError(
                "model: expected the one that the BNStatMatcher was attached to, got a copy of it; "
                "remove() the matcher before the model is copied or replicated"
            )
        self._found, self._calling, self._complete = [], True, False

    def _end(self, *_: Any) -> None:
        self._calling, self._complete = False, True

    def _add(self, bn: nn.Module, statistics: Tensor) -> None:
        if self._calling:
            self._found.append((bn, statistics))

    def _match(
        self,
        bn: nn.Module,
        x: Tensor,
        relu: bool = False,
        residual: Tensor | None = None,
        pool: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        cast(_BatchNorm, bn)._check_input_dim(x)
        _, _, kind, unbiased = self._options
        return statistics_forward(x, bn, relu, residual, pool, kind, unbiased)


class _Gather(what_runs.StandIn):
    """The hook in plain torch; uses what the forward has already left, if that was for the same input."""

    def __init__(self, matcher: BNStatMatcher):
        self._matcher = matcher

    def __call__(self, bn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        matcher = self._matcher
        kept, matcher._kept = matcher._kept, None
        x = args[0] if args else kwargs.get("input")
        if kept is not None and kept[0] is bn and kept[1] is x:
            statistics = kept[2]
        else:
            _, _, kind, unbiased = matcher._options
            statistics = statistics_of(cast(Tensor, x), bn, kind, unbiased)
        matcher._add(bn, statistics)


class _Replaced(what_runs.StandIn):
    """Set as ``forward`` on an instance of the model that had none; removing it restores the class's own."""

    def __init__(self, module: nn.Module, matcher: BNStatMatcher):
        self._module, self._matcher = module, matcher
        self._plain = partial(type(module).forward, module)
        self._attached = True
        vars(module)["forward"] = self

    def remove(self) -> None:
        self._attached = False
        if vars(self._module).get("forward") is self:  # and not one that was set since
            del vars(self._module)["forward"]

    def __reduce_ex__(self, version: Any) -> Any:
        return self._matcher.__reduce_ex__(version)


class _Matched(_Replaced):
    """A BatchNorm's forward on our kernel, which leaves the statistics for the hook that follows."""

    def __call__(self, input: Tensor) -> Tensor:
        matcher, bn = self._matcher, self._module
        if not self._attached or type(input) not in (Tensor, nn.Parameter):
            return self._plain(input)
        y, statistics = matcher._match(bn, input)
        matcher._kept = (bn, input, statistics)
        return y


class _Fused(_Replaced):
    """A forward by graphs in which BatchNorms are fused with what follows; the class's own where none is proven."""

    def __init__(self, module: nn.Module, matcher: BNStatMatcher):
        self._reads = what_runs.Reads(module)  # first, for it may raise
        self._signature = inspect.signature(type(module).forward)
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        if not kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
            raise Unproven("it takes any number of arguments")
        self._graphs: dict[Any, Graph | None] = {}
        super().__init__(module, matcher)

    def expect(self) -> None:
        """Trace a call with one tensor, if that is all that the forward requires."""
        needed = [p for p in self._signature.parameters.values() if p.default is inspect.Parameter.empty]
        if len(needed) == 2:  # the first is the module
            self._graph(self._arguments((torch.empty(0, device="cpu"),), {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self._attached and not what_runs.has_global_hooks():
            arguments = self._arguments(args, kwargs)
            graph = self._graph(arguments)
            if graph is not None:
                return graph.forward(*(value for value in arguments if isinstance(value, Tensor)))
        return self._plain(*args, **kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        bound = self._signature.bind(self._module, *args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.values())[1:]

    def _graph(self, arguments: Sequence[Any]) -> Graph | None:
        """The graph for tensors in the same places and equal constants, if all that was read is unchanged."""
        tensors = [value for value in arguments if type(value) in (Tensor, nn.Parameter)]
        if len({id(tensor) for tensor in tensors}) < len(tensors):  # a forward might check for that
            return None
        given: list[object] = []
        for value in arguments:
            if type(value) in (Tensor, nn.Parameter):
                given.append(Tensor)
            elif value is None or type(value) in (bool, int, float, str):
                given.append((type(value), value))
            else:
                return None
        state = self._reads.state()
        if state is None:
            return None
        key = (*given, *state)
        graph = self._graphs.get(key)
        if graph is not None and not graph.still_holds():
            del self._graphs[key]
        if key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.clear()
            self._graphs[key] = self._traced(arguments)
        return self._graphs[key]

    def _traced(self, arguments: Sequence[Any]) -> Graph | None:
        module, matcher = self._module, self._matcher
        try:
            graph = Graph(module, arguments, matcher._names, partial(_FusedBatchNorm, matcher))
        except Unproven as error:
            for child in module.children():
                if child in matcher._names:
                    matcher._why.setdefault(matcher._names[child], f"{type(module).__name__}.forward: {error}")
            return None
        matcher._tell(graph)
        return graph if graph.fused else None


class _FusedBatchNorm(nn.Module):
    """A BatchNorm of a matched model with the ReLU after it, and the sum in between or the pooling at the end."""

    def __init__(self, matcher: BNStatMatcher, bn: nn.Module, pool: tuple[int, int, int] | None, place: Place | None):
        super().__init__()
        self._run = partial(self._matched, matcher, bn)  # holds the BatchNorm without registering it as a child
        self._pool, self._place = pool, place

    @staticmethod
    def _matched(matcher: BNStatMatcher, bn: nn.Module, x: Tensor, **options: Any) -> Tensor:
        y, statistics = matcher._match(bn, x, **options)
        matcher._add(bn, statistics)
        return y

    def forward(self, x: Tensor, summand: Any = None) -> Tensor:
        if self._place is None:
            y = self._run(x, relu=True, pool=self._pool)
            if self._pool is None or x.is_contiguous(memory_format=torch.channels_last):
                return y
            return y.contiguous()  # pooled in channels-last memory, but views of torch's result must still work
        in_place = self._place == "in place"
        alike = isinstance(summand, Tensor) and (summand.shape, summand.dtype) == (x.shape, x.dtype)
        if alike and (in_place or summand.stride() == x.stride()):
            return self._run(x, relu=True, residual=summand)
        y = self._run(x)  # the sum broadcasts, or has another precision or layout
        if in_place:
            y += summand
            return y.relu()
        return (y + summand if self._place == "left" else summand + y).relu()


def _refuse_compiled(name: str, module: nn.Module) -> None:
    if what_runs.is_compiled(module) and any(isinstance(child, _BatchNorm) for child in module.modules()):
        raise ValueError(
            f"model: {name or 'itself'} is compiled; attach the matcher before torch.compile, or to the plain"
        )
    if isinstance(module, torch.jit.ScriptModule) and module.original_name.startswith("BatchNorm"):
        raise ValueError(f"model: {name or 'itself'} is a scripted BatchNorm, whose input cannot be seen")
