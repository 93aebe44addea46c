"""TESLA: trajectory matching in constant memory, by an estimate of the gradient.

Cui, Wang, Si, Hsieh, "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", ICML 2023. Its gradient
treats the student's parameters as constants (``mode="first_order"``, the default here); ``mode="exact"`` has the true
one in the same memory. Labels may be the matched expert's predictions for the images (``soft_labels``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydistill.methods.outer import State
from pydistill.methods.trajectory.matching import SMALL, Matching, Segment
from pydistill.methods.trajectory.mtt import MTT, _row
from pydistill.trajectory import FlatModule


@dataclass(frozen=True)
class TESLA(Matching):
    """MTT's hyper-parameters, and what TESLA adds."""

    name: ClassVar[str] = "tesla"
    about: ClassVar[str] = "MTT by a first-order gradient, with soft labels"
    paper: ClassVar[str] = "Cui et al., ICML 2023"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        **SMALL,
        "cifar10": MTT.presets["cifar10"] | {1: _row(50, 2, 5, 1000.0, 1e-7, zca=True)},
        "cifar100": MTT.presets["cifar100"],
        "imagenet-1k": {1: _row(10, 3, 10, 1e4, 1e-4, batch_syn=100, soft_labels=True)},
    }

    mode: Literal["exact", "first_order", "full"] = "first_order"
    """How the gradient is taken: exact with little memory, first_order leaves out second derivatives, full keeps
    every step."""
    soft_labels: bool = False
    """Use the matched expert's probabilities as labels, recomputed in each iteration."""
    bug_compatible: bool = False
    """Halve the images' gradient, as the published code does."""

    def segment(self, number: int, state: State, net: nn.Module, experts: Any) -> Segment:
        found = super().segment(number, state, net, experts)
        if self.soft_labels:
            with torch.no_grad():
                found.labels = FlatModule(net)(found.target, state["images"]).softmax(1)
        return found

    def update(self, state: State, grads: dict[str, Tensor]) -> None:
        # the code multiplies a tuple by 2, which repeats it, instead of applying the formula's factor
        scale = 0.5 if self.bug_compatible else 1.0
        super().update(state, grads | {"images": scale * grads["images"]})
