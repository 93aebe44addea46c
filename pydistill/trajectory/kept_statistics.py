"""The running statistics of BatchNorm layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pydistill.ops.convnet_step import ConvNetShape


class KeptStatistics:
    """The running means and variances of a net's BatchNorms: the modules' own or, after `split`, those of E
    students."""

    def __init__(self, net: nn.Module):
        self.norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
        self._students: list[dict[str, Tensor]] | None = None

    @property
    def tracked(self) -> bool:
        return any(norm.running_mean is not None for norm in self.norms.values())

    def split(self, students: int) -> None:
        """From now on each student has its own, initially a copy of the modules'."""
        self._students = [{name: b.detach().clone() for name, b in self._modules().items()} for _ in range(students)]

    def buffers(self) -> dict[str, Tensor]:
        """The students', ``[E, ...]`` by the modules' names."""
        assert self._students is not None  # after `split`
        return {name: torch.stack([own[name] for own in self._students]) for name in self._students[0]}

    def running(self) -> Tensor:
        """Means and variances of all blocks side by side, ``[2, sum of widths]``, or with E in front after `split`."""
        found = [
            torch.stack([torch.cat([own[f"{name}.running_{what}"] for name in self.norms]) for what in ("mean", "var")])
            for own in self._students or [self._modules()]
        ]
        return found[0] if self._students is None else torch.stack(found)

    def update(self, shape: ConvNetShape, statistics: Tensor, images: int) -> None:
        """As a forward pass in training mode does, one student after the other.

        Args:
            statistics: ``[E, 2, sum of widths]``, the means and biased variances of a batch of ``images``.
        """
        for e, (means, variances) in enumerate(statistics):
            own = self._modules() if self._students is None else self._students[e]
            rows = zip(means.split(shape.widths), variances.split(shape.widths), strict=True)
            for (name, norm), (mean, variance), layer in zip(self.norms.items(), rows, shape.layers, strict=True):
                if f"{name}.running_mean" not in own:
                    continue
                values = images * layer.height * layer.width
                seen = own[f"{name}.num_batches_tracked"].add_(1)
                share = 1 / seen.item() if norm.momentum is None else norm.momentum
                own[f"{name}.running_mean"].mul_(1 - share).add_(mean, alpha=share)
                own[f"{name}.running_var"].mul_(1 - share).add_(variance, alpha=share * values / (values - 1))

    def _modules(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": b for name, norm in self.norms.items() for key, b in norm.named_buffers()}
