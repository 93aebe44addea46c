"""Networks of torch's own layers as data: how a file can describe a network without naming code to run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

__all__ = ["describe", "from_description", "is_untouched"]

# fmt: off
_LAYERS: dict[str, type[nn.Module]] = {layer.__name__: layer for layer in (
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, nn.LocalResponseNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity,
)}
# fmt: on


def is_untouched(module: nn.Module) -> bool:
    """Whether a module, ignoring its children, runs its class's forward and nothing before or after."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" not in vars(module) and not hooks


def describe(net: nn.Module) -> dict[str, Any] | None:
    """A JSON description from which `from_description` makes the network, without its numbers.

    Returns:
        None if it is not made only of ``nn.Sequential`` and some of torch's layers, or if a hook or a forward was set
        on one of them.
    """
    if not is_untouched(net):
        return None
    if type(net) is nn.Sequential:
        inside = {name: describe(child) for name, child in net.named_children()}
        return None if None in inside.values() else {"sequential": inside}
    if _LAYERS.get(type(net).__name__) is not type(net):
        return None
    defaults = _arguments(type(net))
    options = {name: getattr(net, name) for name in defaults}
    if "bias" in options:  # for a norm without weight as well, another option says so
        has_weight = options.get("affine", True) and options.get("elementwise_affine", True)
        options["bias"] = options["bias"] is not None or not has_weight
    # defaults are omitted, so that other versions of torch, with other options, can read it
    options = {name: value for name, value in options.items() if value != defaults[name]}
    return {"layer": type(net).__name__, "options": options}


def from_description(description: Any) -> nn.Module:
    """Makes the network that `describe` described, on the meta device: its numbers are the caller's to assign.

    Raises:
        ValueError: it is not such a description.
    """
    try:
        with torch.device("meta"):
            return _built(description)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"description: expected layers of torch and their options, got others ({error!r})") from error


def _built(description: dict[str, Any]) -> nn.Module:
    if "sequential" in description:
        net = nn.Sequential()
        for name, inside in description["sequential"].items():
            net.add_module(name, _built(inside))
        return net
    layer, options = _LAYERS[description["layer"]], description["options"]
    if unknown := options.keys() - _arguments(layer).keys():
        raise ValueError(f"{layer.__name__} has no {', '.join(sorted(unknown))}")
    return layer(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})


def _arguments(layer: type[nn.Module]) -> dict[str, Any]:
    """The constructor arguments that a layer keeps under the same names, with their defaults."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(layer).parameters.values()
    return {each.name: each.default for each in found if each.kind in named and each.name not in ("device", "dtype")}
