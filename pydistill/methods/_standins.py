"""BatchNorm matching on the operator, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BNStatMatcher:
    def __init__(self, model, *, w_mean=1.0, w_var=1.0, first=1.0):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            raise ValueError("model: expected BatchNorm layers, found none")
        for m in norms:
            if m.training:
                raise ValueError("model: expected BatchNorm in eval mode, got one in training mode")
        self.w_mean, self.w_var, self.first = w_mean, w_var, first
        self.losses: dict[int, Tensor] = {}
        self.handles = [m.register_forward_hook(self._hook(i)) for i, m in enumerate(norms)]

    def _hook(self, i):
        def hook(module, inputs, output):
            x = inputs[0]
            dims = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x, dims, unbiased=False)
            norm = torch.linalg.vector_norm
            loss = self.w_mean * norm(mean - module.running_mean) + self.w_var * norm(var - module.running_var)
            self.losses[i] = loss * (self.first if i == 0 else 1.0)

        return hook

    def loss(self) -> Tensor:
        return torch.stack([self.losses[i] for i in sorted(self.losses)]).sum()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
