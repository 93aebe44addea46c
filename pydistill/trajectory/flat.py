"""A module seen as a function of one flat parameter vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatModule:
    """``net`` as a function of theta ``[P]``, its parameters flattened and joined in ``net.parameters()`` order.

    Equivalent to filling the parameters by ``nn.utils.vector_to_parameters(theta, net.parameters())`` and calling
    ``net``, but differentiable in theta.
    """

    def __init__(self, net: nn.Module):
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: expected an nn.Module, got {type(net).__name__}")
        net = getattr(net, "reparametrised", net)  # a wrapper names the network that its flat vector belongs to
        self.net = net
        self.names = [name for name, _ in net.named_parameters()]
        self.shapes = [p.shape for p in net.parameters()]
        self.sizes = [p.numel() for p in net.parameters()]
        self.numel = sum(self.sizes)
        if self.numel == 0:
            raise ValueError("net: it has no parameters")

    def parameters(self) -> Tensor:
        """The module's own parameters as one detached vector ``[P]``."""
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta by parameter name."""
        if theta.shape != (self.numel,):
            raise ValueError(f"theta: expected shape [{self.numel}] for this net, got {list(theta.shape)}")
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def __call__(self, theta: Tensor, *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """``net(*inputs)`` at theta; ``buffers`` stand in for the module's own, which are then left untouched."""
        return functional_call(self.net, {**self.unflatten(theta), **(buffers or {})}, inputs, kwargs)
