"""INFER (Zhang et al., ICLR 2025): real images, and a compensator u that is added to those of all classes alike.

For each of the teachers, and each number j of a real image, u minimises SRe2L's loss of x_cj + u over all classes c.
The product is the real images and, for each teacher, the same images plus u: ``n (M + 1)`` images per class from the
storage of ``n``, and of ``n M`` compensators shared by all classes, so that n = ipc / (M / K + 1), rounded down, real
images fill the budget of ``ipc``. Labels are meant to be the teachers' mean, mixed: ``pydistill relabel``.

The published file for ImageNet refers to names that it does not define; this follows the one for CIFAR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pydistill.methods.decoupled.recover import Batch, Recover

__all__ = ["INFER"]


@dataclass(frozen=True)
class INFER(Recover):
    """INFER's hyper-parameters; the defaults are the published script's for CIFAR."""

    name: ClassVar[str] = "infer"
    about: ClassVar[str] = "real images, and compensators that all classes share"
    paper: ClassVar[str] = "Zhang et al., ICLR 2025"
    starts_real: ClassVar[bool] = True
    takes_several: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"iterations": 200, "jitter": 2},
        "fashion-mnist": {"iterations": 300, "jitter": 2, "r_bn": 0.01},
        "cifar10": {},
        "cifar100": {},
        "tiny-imagenet": {},
        "imagenet-1k": {"r_bn": 0.01, "crop": 0.08, "flip": 0.5, "jitter": 32},
    }

    ipc: int = 10
    """Images per class that would take the same storage; see the module for how many come out."""
    r_bn: float = 1.0
    """Weight of the BatchNorm statistics."""
    start: Literal["random", "kmeans"] = "random"
    """Real images to start from: drawn, or those nearest to the centres of each class's logits."""

    def per_class(self, num_classes: int, num_teachers: int) -> tuple[int, int]:
        natural = int(self.ipc / (num_teachers / num_classes + 1))
        if natural < 1:
            raise ValueError(
                f"ipc: expected enough for a real image of each class beside {num_teachers} teachers' compensators, "
                f"got {self.ipc}"
            )
        return natural * (num_teachers + 1), natural

    def batches(self, num_classes: int, num_teachers: int) -> list[Batch]:
        """All classes' images 0, 1, ... as they are, and then each again for every teacher."""
        count, natural = self.per_class(num_classes, num_teachers)
        labels = torch.arange(num_classes, device="cpu")
        return [
            Batch(i, torch.full_like(labels, i), labels, max(0, i // natural - 1), moves=i >= natural)
            for i in range(count)
        ]

    def variables(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(images[:1]), images
