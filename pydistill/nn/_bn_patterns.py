"""Finds, in one module's own forward, BatchNorms whose output a ReLU takes, directly or behind a sum, and max poolings.

The forward is traced with all children as leaves, so that a module called by it is called as before, hooks included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydistill.nn.frozen import pooling_of


class _Shallow(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fused(
    module: nn.Module, make: Callable[[nn.Module, tuple[int, int, int] | None], nn.Module]
) -> tuple[fx.GraphModule, list[tuple[nn.Module, str]]] | None:
    """``module`` with the BatchNorms fused, and for each of them "relu", "add, relu" or "relu, max pool"; None where
    there are none.

    ``make(bn, pool)`` is called with the input, and the other summand if there is one, and includes the ReLU; and the
    pooling, with its kernel, stride and padding, where ``pool`` is not None.
    """
    if not any(isinstance(child, _BatchNorm) for child in module.children()):
        return None
    graph = _traced(module)
    # what the module itself holds (parameters, buffers) may be exchanged later, which a graph would not see
    if graph is None or any(node.op == "get_attr" for node in graph.nodes):
        return None
    children = {node.target: module.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    found = []
    for node in list(graph.nodes):
        bn = children.get(node.target) if node.op == "call_module" else None
        if not isinstance(bn, _BatchNorm) or _has_hooks(bn) or len(node.args) != 1 or node.kwargs:
            continue
        after, summand = _only_user(node), None
        if after is not None and (summand := _other_summand(after, node)) is not None:
            after = _only_user(after)
        if after is None or not _is_relu(after, children):
            continue
        taken_in = [after, *_between(after, node), node]  # in the order in which nobody uses them any more
        pool = None
        behind = _only_user(after) if summand is None else None
        if behind is not None and (pool := _pooling(behind, children)) is not None:
            taken_in.insert(0, behind)
        name = f"{node.target.replace('.', '_')}_matched_{len(found)}"
        children[name] = make(bn, pool)
        with graph.inserting_before(taken_in[0]):
            new = graph.call_module(name, node.args if summand is None else (*node.args, summand))
        taken_in[0].replace_all_uses_with(new)
        for old in taken_in:
            graph.erase_node(old)
        found.append((bn, "relu, max pool" if pool else "relu" if summand is None else "add, relu"))
    if not found:
        return None
    used = {node.target for node in graph.nodes if node.op == "call_module"}
    return fx.GraphModule({name: child for name, child in children.items() if name in used}, graph), found


def _traced(module: nn.Module) -> fx.Graph | None:
    before = dict(vars(module))
    try:
        graph = _Shallow().trace(module)
    except Exception:  # whatever a forward raises that asks a placeholder for a value: it runs unfused then
        graph = None
    if any(vars(module).get(name) is not value for name, value in before.items()) or len(vars(module)) != len(before):
        # a forward that leaves something on the module does more than its graph says
        vars(module).clear()
        vars(module).update(before)
        return None
    return graph


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """Of a sum of two nodes, ``one`` among them, the other."""
    in_place = (node.op, node.target) in (("call_function", operator.iadd), ("call_method", "add_"))
    plain = (node.op, node.target) in (
        ("call_function", operator.add),
        ("call_function", torch.add),
        ("call_method", "add"),
    )
    if not (in_place or plain) or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return None
    if a is one:
        return b
    return None if in_place else a  # in place of the other summand, others may look at the sum


def _between(relu: fx.Node, bn: fx.Node) -> list[fx.Node]:
    """The sum, where there is one."""
    return [node for node in relu.all_input_nodes if node is not bn]


def _pooling(node: fx.Node, children: dict[str, Any]) -> tuple[int, int, int] | None:
    child = children[node.target] if node.op == "call_module" else None
    if child is None or _has_hooks(child) or len(node.args) != 1 or node.kwargs:
        return None
    return pooling_of(child)


def _is_relu(node: fx.Node, children: dict[str, Any]) -> bool:
    if node.op == "call_module":
        child = children[node.target]
        return type(child) is nn.ReLU and not _has_hooks(child)
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu, torch.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")
