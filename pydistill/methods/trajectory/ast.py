"""AST: smooth experts, and a student that is kept close to them all the way.

Shen, Yang, Lam, "Efficient Dataset Distillation via Alignment with Smooth and High-Quality Expert Trajectories", 2023.
Experts are slowed down early and have a gradient penalty; students have momentum, start slightly off the expert, match
each of its epochs on the way, and learn faster the later they start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.data import Dataset
from pydistill.methods.outer import State
from pydistill.methods.trajectory.matching import SMALL, Matching, Segment
from pydistill.methods.trajectory.mtt import _row
from pydistill.seeding import Stream, seeded_generator
from pydistill.select import representatives
from pydistill.trajectory import FlatModule, Smoothing
from pydistill.trajectory.flat import perturb_towards

_LOSS_DECAY = tuple(round(0.5 + 0.05 * epoch, 2) for epoch in range(10))  # factors of the experts' first epochs


@dataclass(frozen=True)
class AST(Matching):
    """MTT's hyper-parameters, and AST's; the learning rates are for students with momentum."""

    name: ClassVar[str] = "ast"
    about: ClassVar[str] = "MTT on smooth experts, matched on the way too"
    paper: ClassVar[str] = "Shen, Yang, Lam, 2023"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        data: {ipc: row | {"lr_teacher": 0.01} for ipc, row in rows.items()} for data, rows in SMALL.items()
    } | {
        "cifar10": {
            1: _row(50, 2, 2, 1000.0, 1e-7, zca=True),
            10: _row(20, 3, 25, 1000.0, 1e-5, zca=True),
            50: _row(30, 2, 40, 1000.0, 1e-5, zca=True),
        },
        "cifar100": {1: _row(20, 3, 20, 1000.0, 1e-5, zca=True), 10: _row(20, 3, 25, 1000.0, 1e-5, zca=True)},
    }

    student_momentum: float = 0.9
    """Momentum of the students' SGD."""
    match_between: bool = True
    """Match the expert's epochs on the way, too."""
    balance_loss: bool = True
    """Weight a student's loss by the epoch where it starts."""
    perturb: float = 1.0
    """How far students start from the expert, as a share of each weight."""
    representative: bool = True
    """Start from the real images nearest to the centres of their class."""
    gradient_penalty: float = 2.0
    """Weight of the penalty on the gradients of the experts; 0 omits it, so that experts can be trained at once."""
    clip_norm: float | None = None
    """Largest norm of an expert's gradient; no limit by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match_between and self.syn_steps < self.expert_epochs:
            raise ValueError(
                f"syn_steps: expected at least {self.expert_epochs}, one for each of expert_epochs that match_between "
                f"matches, got {self.syn_steps}"
            )

    def expert_options(self, epochs: int) -> dict[str, Any]:
        smoothing = Smoothing(self.gradient_penalty, _LOSS_DECAY[:epochs], self.clip_norm)
        return {"momentum": 0.9, "weight_decay": 1e-3, "smoothing": smoothing}

    def initial_images(self, dataset: Dataset, net: nn.Module, experts: Any) -> tuple[Tensor, Tensor]:
        if not self.representative:
            return super().initial_images(dataset, net, experts)
        theta = experts.segment(0, 0, self.max_start_epoch - 1 + self.expert_epochs)[1].to(dataset.train_images.device)
        flat = FlatModule(net)
        with torch.no_grad():
            logits = torch.cat([flat(theta, x) for x in dataset.train_images.split(500)])
        index = representatives(logits, dataset.train_labels, self.ipc, seeded_generator(self.seed, Stream.SYNTHETIC))
        return dataset.train_images[index].clone(), dataset.train_labels[index].clone()

    def segment(self, number: int, state: State, net: nn.Module, experts: Any) -> Segment:
        found = super().segment(number, state, net, experts)
        if self.match_between:
            found.between = {
                self.syn_steps // self.expert_epochs * i: to_device(
                    experts.segment(found.expert, found.start, i)[1].to(found.theta0.dtype), found.theta0.device
                )
                for i in range(1, self.expert_epochs)
            }
        if self.perturb:
            shape, generator = found.theta0.shape, found.generator
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(found.theta0.dtype)
            noise = to_device(noise, found.theta0.device)
            found.theta0 = perturb_towards(found.theta0, noise, self.perturb, FlatModule(net))
        if self.balance_loss:  # a factor on the loss acts on the learning rate, as the students have no weight decay
            late = found.start - self.max_start_epoch // 2
            found.lr_scale = math.log(late + 8, 5) if late >= 0 else 1 / math.log(8 - late, 5)
        return found
