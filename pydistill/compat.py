"""Interfaces that the method repositories use, on the package's own parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pydistill.trajectory.flat import FlatModule


class ReparamModule(nn.Module):
    """A network called at a flat parameter vector: ``module(x, flat_param=theta)``.

    The interface of the class of that name in the trajectory-matching repositories (MTT, TESLA, FTD, DATM, AST):
    ``flat_param`` is the module's own vector ``[P]`` in ``net.parameters()`` order, ``param_numel`` its length, and a
    vector passed to the call replaces it. A leading dimension of size one, which those repositories add for
    ``DataParallel``, is dropped. The wrapped network stays as it was, with its own parameters, under ``.module``.

    Raises:
        ValueError: theta has the wrong length.
    """

    module: nn.Module

    def __init__(self, module: nn.Module):
        super().__init__()
        flat = FlatModule(module)
        self._flat = flat
        # not registered as a submodule: the wrapper's only parameter is the flat vector
        object.__setattr__(self, "module", module)
        self.flat_param = nn.Parameter(flat.parameters())
        self.param_numel = flat.numel
        self._param_shapes = tuple(flat.shapes)
        self._param_numels = tuple(flat.sizes)
        self._param_infos = tuple(flat.names)

    @property
    def reparametrised(self) -> nn.Module:
        """The network whose parameters the flat vector represents."""
        return self.module

    def train(self, mode: bool = True) -> ReparamModule:
        self.module.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ReparamModule:
        self.module._apply(fn, recurse)  # .to(), .double(): its buffers must move along
        return super()._apply(fn, recurse)

    def forward(
        self, *inputs: Any, flat_param: Tensor | None = None, buffers: Sequence[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """``module(*inputs)`` with parameters from ``flat_param`` (default: its own) and optionally other buffers."""
        theta = self.flat_param if flat_param is None else flat_param
        if theta.dim() == 2 and theta.shape[0] == 1:
            theta = theta[0]
        named = None
        if buffers is not None:
            names = [name for name, _ in self.module.named_buffers()]
            named = dict(zip(names, buffers, strict=True))
        return self._flat(theta, *inputs, buffers=named, **kwargs)
