"""FTD: experts with flat trajectories, and an average of the synthetic images.

Du, Jiang, Tan, Zhou, Li, "Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation", CVPR 2023.
Experts descend along GSAM's gradient, which finds flatter minima; the distillation is MTT's, and its result is the
exponential moving average of the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pydistill.data import Dataset
from pydistill.methods.outer import State
from pydistill.methods.trajectory.matching import SMALL, Matching
from pydistill.methods.trajectory.mtt import _row
from pydistill.trajectory import GSAM
from pydistill.trajectory.flat import ema_


@dataclass(frozen=True)
class FTD(Matching):
    """MTT's hyper-parameters, and FTD's; presets of CIFAR and Tiny ImageNet are its Table 7."""

    name: ClassVar[str] = "ftd"
    about: ClassVar[str] = "MTT on experts whose trajectories are flat"
    paper: ClassVar[str] = "Du et al., CVPR 2023"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        data: {ipc: row | {"ema_decay": 0.95} for ipc, row in rows.items()} for data, rows in SMALL.items()
    } | {
        "cifar10": {
            1: _row(50, 2, 2, 100.0, 1e-7, ema_decay=0.9999, zca=True),
            10: _row(30, 2, 20, 100.0, 1e-5, lr_teacher=0.001, ema_decay=0.9995, zca=True),
            50: _row(30, 2, 40, 1000.0, 1e-5, lr_teacher=0.001, ema_decay=0.999, zca=True),
        },
        "cifar100": {
            1: _row(40, 3, 20, 1000.0, 1e-5, ema_decay=0.9995, zca=True),
            10: _row(20, 2, 40, 1000.0, 1e-5, ema_decay=0.9995, zca=True),
            50: _row(80, 2, 40, 1000.0, 1e-5, batch_syn=1000, ema_decay=0.999, zca=True),
        },
        "tiny-imagenet": {
            1: _row(30, 2, 10, 1e4, 1e-4, ema_decay=0.999),
            10: _row(20, 2, 40, 1e4, 1e-4, batch_syn=500, ema_decay=0.999),
        },
    }

    ema_decay: float = 0.999
    """Decay of the moving average of the images, which is the result."""
    rho: float = 0.01
    """Radius of GSAM, by which the experts are trained."""
    alpha: float = 0.4
    """GSAM's weight of the component off the flat direction, for the experts."""

    def expert_options(self, epochs: int) -> dict[str, Any]:
        return {"sharpness": GSAM(self.rho, self.alpha, adaptive=True)}

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        state = super().initial(dataset, net, experts)
        state["average"] = state["images"].clone()
        return state

    def update(self, state: State, grads: dict[str, Tensor]) -> None:
        super().update(state, grads)
        state["average"] = state["average"].clone()
        ema_(state["average"], state["images"], self.ema_decay)

    def result(self, state: State) -> tuple[Tensor, Tensor, float]:
        return state["average"], *super().result(state)[1:]
