"""A function of tensors as one simplified graph of aten's operators, with its convolutions by Winograd's tiles."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pydistill.ops._conv2d_winograd import conv2d_filters, conv2d_weight_grad

__all__ = ["Untraceable", "traced"]

aten = torch.ops.aten


class Untraceable(Exception):
    """What stopped a trace."""


def traced(function: Callable[..., list[Tensor]], arguments: Sequence[Tensor], direction: int | None) -> fx.GraphModule:
    """``function`` as one graph of aten's operators, without what its results do not need."""
    try:
        # the cache returns views as plain tensors, and forward mode asserts that they are views
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            graph = make_fx(function, tracing_mode="fake")(*arguments)
    except Exception as error:
        raise Untraceable((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    for node in graph.graph.nodes:
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"engine: expected a net that draws no random numbers to be compiled, it calls {node}")
    graph.graph.eliminate_dead_code()
    _drop_zeros(graph.graph)
    _narrow(graph.graph)
    if arguments[0].device.type == "cpu":
        _by_winograd(graph, direction)
    graph.recompile()
    return graph


_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten._efficientzerotensor.default, aten.new_zeros.default}
_VIEWS = {
    *(aten.expand.default, aten.alias.default, aten.view.default, aten.permute.default, aten.detach.default),
    *(aten.t.default, aten.transpose.int, aten.clone.default, aten._to_copy.default, aten._unsafe_view.default),
}


def _drop_zeros(graph: fx.Graph) -> None:
    """Remove convolutions of zero tangents: the images do not move along a direction of the parameters."""
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target in _ZEROS or (node.target in _VIEWS and node.args[0] in zero):
            zero.add(node)
        elif node.target is aten.convolution.default and (node.args[0] in zero or node.args[1] in zero):
            if node.args[2] is None:
                zero.add(node)
        elif node.target is operator.getitem and _gives_zero(node, zero):
            zero.add(node)
        elif node.target is aten.add.Tensor and not node.kwargs:
            for nothing, rest in (node.args, node.args[::-1]):
                same = isinstance(rest, fx.Node) and _looks(rest) == _looks(node)
                if nothing in zero and same:
                    node.replace_all_uses_with(rest)
                    break
    graph.eliminate_dead_code()


def _gives_zero(item: fx.Node, zero: set[fx.Node]) -> bool:
    of, which = cast(tuple[fx.Node, int], item.args)
    if of.target is not aten.convolution_backward.default or not cast(Sequence[bool], of.args[10])[which]:
        return False
    grad, x, weight = (arg in zero for arg in of.args[:3])
    return grad or (which == 0 and weight) or (which == 1 and x)


def _looks(node: fx.Node) -> tuple:
    value = node.meta["val"]
    return value.shape, value.dtype


def _narrow(graph: fx.Graph) -> None:
    """Ask the convolutions' backward only for the gradients that are used."""
    for node in reversed(graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
        used = {user.args[1] for user in node.users}
        node.update_arg(10, [wanted and i in used for i, wanted in enumerate(node.args[10])])
        if not used:
            graph.erase_node(node)
    graph.eliminate_dead_code()


_SAME = {aten.detach.default, aten.alias.default}

# least positions of all images, and channels, for which transforming a layer's filters in every step pays off
_LEAST_POSITIONS = 512
_LEAST_CHANNELS = 32
# the largest share of the direct convolution's products that Winograd may take: small images fill no tile
_MOST_PRODUCTS = 0.5


def _by_winograd(module: fx.GraphModule, direction: int | None) -> None:
    """Move convolutions of 3x3 and 5x5 taps to the kernels of `pydistill.ops`: a quarter or a third of the products.

    Those of the forward pass itself stay direct, since they decide on which side of zero an activation is.
    ``direction``: which argument the tangents come from.
    """
    graph = module.graph
    moving: set[fx.Node] = set()
    filters: dict[tuple[fx.Node, bool], fx.Node] = {}
    weight_grad = conv2d_weight_grad.raw

    def transformed(weight: fx.Node, turned: bool) -> fx.Node:
        while weight.target in _SAME:
            weight = cast(fx.Node, weight.args[0])
        if (weight, turned) not in filters:
            with graph.inserting_after(weight):
                filters[weight, turned] = graph.call_function(conv2d_filters.raw, (weight, turned))
        return filters[weight, turned]

    def convolved(x: fx.Node, weight: fx.Node, turned: bool) -> fx.Node:
        both, taps = (transformed(weight, turned), transformed(weight, not turned)), weight.meta["val"].shape[2]
        with graph.inserting_before(node):
            return graph.call_function(torch.ops.pydistill.frozen_conv2d.default, (x, *both, taps, taps // 2))

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node in placeholders:
            if placeholders.index(node) == direction:
                moving.add(node)
        elif any(source in moving for source in node.all_input_nodes):
            moving.add(node)
        if node.target is aten.convolution.default and node in moving:
            x, weight, bias, *rest = node.args
            if not _is_for_winograd(x, weight, rest):
                continue
            y = convolved(x, weight, False)
            if bias is not None:
                with graph.inserting_before(node):
                    y = graph.call_function(
                        aten.add.Tensor, (y, graph.call_function(aten.view.default, (bias, [-1, 1, 1])))
                    )
            y.meta = node.meta
            node.replace_all_uses_with(y)
            moving.add(y)
            graph.erase_node(node)
        elif node.target is aten.convolution_backward.default:
            grad, x, weight, _, *rest, mask = node.args
            if not _is_for_winograd(grad, weight, rest):
                continue
            with graph.inserting_before(node):
                taps = weight.meta["val"].shape[2]
                of_weight = graph.call_function(weight_grad, (x, grad, None, None, taps)) if mask[1] else None
                # torch's backward for a bias alone computes the gradient in the weight as well
                of_bias = graph.call_function(aten.sum.dim_IntList, (grad, [0, 2, 3])) if mask[2] else None
            found = (convolved(grad, weight, True) if mask[0] else None, of_weight, of_bias)
            for user in list(node.users):
                new = found[user.args[1]]
                assert new is not None
                new.meta = user.meta
                user.replace_all_uses_with(new)
                graph.erase_node(user)
            if node in moving:
                moving.update(new for new in found if new is not None)
            graph.erase_node(node)
    for node in list(graph.nodes):  # merge two gradients of one weight into one call
        if node.target is aten.add.Tensor and not node.kwargs:
            first, second = node.args
            alone = all(
                isinstance(each, fx.Node)
                and each.target is weight_grad
                and len(each.users) == 1
                and each.args[2] is None
                for each in node.args
            )
            if alone and _looks(first.args[0]) == _looks(second.args[0]):  # a shared layer may see two sizes
                with graph.inserting_before(node):
                    both = graph.call_function(weight_grad, (*first.args[:2], *second.args[:2], first.args[4]))
                node.replace_all_uses_with(both)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_for_winograd(x: fx.Node, weight: fx.Node, geometry: Sequence[Any]) -> bool:
    value, filters = x.meta["val"], weight.meta["val"]
    taps, lanes = filters.shape[2], 64 // value.dtype.itemsize
    if (
        value.dim() != 4
        or taps not in (3, 5)
        or filters.shape[3] != taps
        or value.dtype not in (torch.float32, torch.float64)
        or any(channels < _LEAST_CHANNELS or channels % lanes for channels in filters.shape[:2])
    ):
        return False
    # stride, padding, dilation, transposed, output padding, groups
    plain = [[1, 1], [taps // 2, taps // 2], [1, 1], False, [0, 0], 1]
    (N, _, H, W), side = value.shape, 7 - taps
    products = 36 * (-(-H // side)) * (-(-W // side))
    return list(geometry) == plain and N * H * W >= _LEAST_POSITIONS and products <= _MOST_PRODUCTS * taps**2 * H * W
