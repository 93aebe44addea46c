"""Finds, in one module's own forward, BatchNorms followed by a ReLU, directly or after a sum, and max poolings.

The forward is traced with all children as leaves, so that modules called by it are called as before, hooks included.
Fused modules must be torch's own, and it must be impossible to observe anything in between: see `_what_runs`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pydistill.nn import _what_runs as what_runs
from pydistill.nn._what_runs import Unproven
from pydistill.nn.frozen import CONVOLUTIONS, POOLINGS, pooling_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Place = Literal["left", "right", "in place"]
Make = Callable[[nn.Module, "tuple[int, int, int] | None", "Place | None"], nn.Module]

_SUMS = {
    ("call_function", operator.iadd): True,
    ("call_method", "add_"): True,
    ("call_function", operator.add): False,
    ("call_function", torch.add): False,
    ("call_method", "add"): False,
}


class Graph:
    """A forward as a graph, with BatchNorms fused with what follows.

    Attributes:
        forward: takes the tensors among the arguments, in order.
        fused: the BatchNorms and what each is fused with: "relu", "add, relu" or "relu, max pool".
        left: the other BatchNorms that it calls, and why nothing was fused.
    """

    def __init__(self, module: nn.Module, arguments: Sequence[Any], known: Container[nn.Module], make: Make):
        """Trace ``module`` called with ``arguments``: each a constant, or a tensor that may be a different one later.

        Only ``known`` BatchNorms are fused, if possible.

        Raises:
            Unproven: the graph would not do all that the forward does, whatever the tensors are.
        """
        try:
            self._graph = _Shallow(arguments).trace(module)
        except Exception as error:  # whatever a forward raises when it asks a placeholder for a value
            reason = str(error).partition("\n")[0]
            raise Unproven(f"it depends on what is computed ({type(error).__name__}: {reason})") from None
        if any(node.op == "get_attr" for node in self._graph.nodes):
            # these may be replaced later, which a graph would not see
            raise Unproven("it uses parameters, buffers or other tensors of its own")
        self._children = {
            node.target: module.get_submodule(node.target) for node in self._graph.nodes if node.op == "call_module"
        }
        self._places = [place for target in self._children for place in _places(module, target)]
        self._taken: list[tuple[nn.Module, tuple[type[nn.Module], ...]]] = []  # with the classes they must have
        self.fused: dict[nn.Module, str] = {}
        self.left: dict[nn.Module, str] = {}
        self._drop_identities()
        for node in list(self._graph.nodes):
            bn = self._child(node)
            if bn is not None and bn in known:
                why = self._fuse(node, bn, make)
                if why is not None:
                    self.left[bn] = why
        used = {node.target for node in self._graph.nodes if node.op == "call_module"}
        called = {name: child for name, child in self._children.items() if name in used}
        self.forward = fx.GraphModule(called, self._graph).forward

    def still_holds(self) -> bool:
        """Whether the children are those that were traced, and the fused ones still run what they ran."""
        if any(siblings.get(name) is not child for siblings, name, child in self._places):
            return False
        return not any(
            what_runs.has_hooks(child) or what_runs.why_not_plain(child, *classes) for child, classes in self._taken
        )

    def _child(self, node: fx.Node | None) -> nn.Module | None:
        return self._children[node.target] if node is not None and node.op == "call_module" else None

    def _take(self, node: fx.Node | None, *classes: type[nn.Module]) -> nn.Module | None:
        """The child called with one argument, if skipping the call could not be observed."""
        child = self._child(node)
        if node is None or child is None or len(node.args) != 1 or node.kwargs:
            return None
        return None if what_runs.has_hooks(child) or what_runs.why_not_plain(child, *classes) else child

    def _drop_identities(self) -> None:
        for node in list(self._graph.nodes):
            if (identity := self._take(node, nn.Identity)) is not None:
                self._taken.append((identity, (nn.Identity,)))
                node.replace_all_uses_with(node.args[0])
                self._graph.erase_node(node)

    def _fuse(self, node: fx.Node, bn: nn.Module, make: Make) -> str | None:
        """Fuse a call of a BatchNorm with what follows it, or say why not."""
        if (why := what_runs.why_not_plain(bn, *BATCH_NORMS)) is not None:
            return why
        if self._take(node, *BATCH_NORMS) is None:
            return "it has hooks" if what_runs.has_hooks(bn) else "it is not called with one argument"
        total, summand, place = _only_user(node), None, None
        after = total
        if total is not None and (found := _sum_of(total, node)) is not None:
            summand, place = found
            after = _only_user(total)
        if after is None:
            return "its output goes to more than one place, or out"
        relu = self._take(after, nn.ReLU)
        if relu is None and not _is_relu(after):
            return "what follows is no plain ReLU"
        chain = [node, after] if summand is None or total is None else [node, total, after]
        if not self._nothing_between(chain):
            return "something between it and the ReLU might change its input"
        taken: list[tuple[nn.Module, tuple[type[nn.Module], ...]]] = [(bn, BATCH_NORMS)]
        if relu is not None:
            taken.append((relu, (nn.ReLU,)))
        pool, behind = None, _only_user(after) if summand is None else None
        pooling = self._take(behind, *POOLINGS)
        if pooling is not None and behind is not None and (pool := pooling_of(pooling)) is not None:
            if self._nothing_between([after, behind]):
                taken.append((pooling, POOLINGS))
                chain.append(behind)
            else:
                pool = None
        name = f"{str(node.target).replace('.', '_')}_matched_{len(self._taken)}"
        self._children[name] = make(bn, pool, place)
        with self._graph.inserting_before(chain[-1]):
            new = self._graph.call_module(name, node.args if summand is None else (*node.args, summand))
        chain[-1].replace_all_uses_with(new)
        for old in reversed(chain):  # users first
            self._graph.erase_node(old)
        self._taken += taken
        self.fused[bn] = "relu, max pool" if pool else "relu" if summand is None else "add, relu"
        return None

    def _nothing_between(self, chain: list[fx.Node]) -> bool:
        """Whether the first of ``chain`` can be run together with the last: nothing that runs between the two changes
        what either reads, or could see the first one's output."""
        first, *others = chain
        nodes = list(self._graph.nodes)
        between = nodes[nodes.index(first) + 1 : nodes.index(others[-1])]
        behind_sum = nodes[nodes.index(others[0]) + 1 : nodes.index(others[-1])]
        if any(node not in chain for node in behind_sum):
            return False
        # a residual's other branch runs there: it cannot reach a convolution's fresh output that only we read
        source = first.args[0]
        fresh = isinstance(source, fx.Node) and _only_user(source) is first and _is_convolution(self._child(source))
        return fresh or all(node in chain for node in between)


class _Proxy(fx.Proxy):
    """A placeholder that ``+=`` changes in place, as it does tensors; torch.fx's own is replaced by a new one."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def change(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return change


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Shallow(fx.Tracer):
    """Placeholders for the tensors only, and children as leaves."""

    def __init__(self, arguments: Sequence[Any]):
        super().__init__()
        self._arguments = arguments

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        given = [
            self.create_proxy("placeholder", f"tensor{i}", (), {}) if isinstance(value, Tensor) else value
            for i, value in enumerate(self._arguments)
        ]
        return root_fn, [self.root, *given]


def _places(module: nn.Module, target: str) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """Where ``target`` and the modules on the path to it are held."""
    found = []
    for name in target.split("."):
        child = module._modules[name]
        assert child is not None
        found.append((module._modules, name, child))
        module = child
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _sum_of(node: fx.Node, one: fx.Node) -> tuple[fx.Node, Place] | None:
    """For a sum of two nodes, one of them ``one``: the other, and on which side ``one`` is."""
    in_place = _SUMS.get((node.op, node.target))
    if in_place is None or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return None
    if a is one:
        return b, "in place" if in_place else "left"
    return None if in_place else (a, "right")  # written into the other summand, where others may see the sum


def _is_convolution(child: nn.Module | None) -> bool:
    return child is not None and what_runs.why_not_plain(child, *CONVOLUTIONS) is None


def _is_relu(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu, torch.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")
