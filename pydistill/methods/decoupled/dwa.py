"""DWA (Du et al., NeurIPS 2024): SRe2L's recovery from real images and from a network that is moved for each batch.

Before a batch is made, the weights take K steps up its loss, theta <- theta + (rho / K) grad CE / ||grad CE||, away
from what the network knows of those images, so that batches differ; and the variances have their own weight,
``r_var``. The paper starts each batch's steps from the squeezed weights. In the published code they add up over the
batches that share an image number, and are never undone: ``accumulate``. (That code also leaves the weights'
gradients on during the recovery, which affects only its run time.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.methods.decoupled.recover import Batch, Recover
from pydistill.methods.decoupled.squeeze import Teacher
from pydistill.nn import freeze
from pydistill.ops import multi_crop

__all__ = ["DWA"]


@dataclass(frozen=True)
class DWA(Recover):
    """DWA's hyper-parameters; the defaults are the published script's for CIFAR."""

    name: ClassVar[str] = "dwa"
    about: ClassVar[str] = "from real images, and a network that is moved for each batch"
    paper: ClassVar[str] = "Du et al., NeurIPS 2024"
    starts_real: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"iterations": 200, "jitter": 2},
        "fashion-mnist": {"iterations": 300, "jitter": 2, "flip": 0.5, "crop": 0.5},
        "cifar10": {},
        "cifar100": {},
        "tiny-imagenet": {"iterations": 2000, "lr": 0.1, "batch_size": 200},
        "imagenet-1k": {"iterations": 2000, "r_var": 2.0, "ascent_steps": 15, "crop": 0.08, "flip": 0.5, "jitter": 32},
    }

    r_var: float = 11.0
    """Weight of the variances."""
    rho: float = 0.015
    """Total length of all ascent steps."""
    ascent_steps: int = 12
    """K, the number of ascent steps."""
    accumulate: bool = False
    """Start a batch's steps where those of the previous batch ended, as in the published code."""
    start: Literal["random", "kmeans"] = "random"
    """Real images to start from: drawn, or those nearest to the centres of each class's logits."""

    def network(self, teacher: Teacher, batch: Batch, starts: Callable[[Batch], Tensor]) -> nn.Module:
        net = copy.deepcopy(teacher.net).eval().requires_grad_(True)
        before: list[Batch] = []
        if self.accumulate:
            every = self.batches(teacher.num_classes, 1)
            before = [b for b in every[: batch.number] if b.place[0] == batch.place[0]]
        for each in (*before, batch):
            record = self.view(teacher, each, 0)
            images = starts(each)
            record, y = (to_device(part, images.device) for part in (record, each.labels))
            x = multi_crop(images, record, teacher.shape[1])
            self._ascend(net, x, y)
        return freeze(net)

    def _ascend(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        parameters = list(net.parameters())
        for _ in range(self.ascent_steps):
            grads = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
            length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.add_(g * (self.rho / self.ascent_steps / (length + 1e-12)))
