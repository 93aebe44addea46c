"""What the trajectory-matching methods share: an outer step that draws segments of experts and matches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pydistill._devices import read, to_device
from pydistill.data import Dataset
from pydistill.methods.config import Config
from pydistill.methods.outer import State
from pydistill.methods.ranks import sum_over_ranks, world
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import ExpertStore, Trajectories, as_trajectories, trajectory_match

# The small sets' common values: what works best within minutes on two cores.
DIGITS = {
    "iterations": 150,
    "syn_steps": 10,
    "expert_epochs": 2,
    "max_start_epoch": 5,
    "lr_img": 100.0,
    "lr_lr": 1e-5,
    "lr_teacher": 0.05,
}
FASHION_MNIST = {
    "iterations": 200,
    "syn_steps": 30,
    "expert_epochs": 1,
    "max_start_epoch": 1,
    "lr_img": 300.0,
    "lr_lr": 1e-5,
    "lr_teacher": 0.05,
}
LEAST_LR = 0.01  # the learnt rate stays at this share of lr_teacher or above
SMALL = {"digits": {1: DIGITS, 10: DIGITS}, "fashion-mnist": {1: FASHION_MNIST, 10: FASHION_MNIST}}


@dataclass
class Segment:
    """A segment of an expert's trajectory, and how a student is to follow it."""

    expert: int
    start: int
    generator: torch.Generator  # of the batches and the augmentation
    theta0: Tensor  # [P]
    target: Tensor  # [P]
    lr_scale: float = 1.0  # factor on the student's learning rate
    between: dict[int, Tensor] | None = None  # intermediate targets by step
    labels: Tensor | None = None  # the student's own


@dataclass(frozen=True)
class Matching(Config):
    """Hyper-parameters under the names of MTT's code.

    The students' learning rate, which is learnt, is kept at or above a hundredth of ``lr_teacher``: an outer step that
    would take it lower, or below zero where no student can be trained, ends there, and its record says where it would
    have led (``lr_below``). HaBa and its descendants keep it above 0.001.
    """

    needs_experts: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    may_be_zero: ClassVar[tuple[str, ...]] = ("seed", "min_start_epoch")
    student_lr: ClassVar[str] = "lr_teacher"

    syn_steps: int = 50
    """Inner steps of a student on synthetic images."""
    expert_epochs: int = 2
    """Epochs of the expert that a student's steps are to cover: how far ahead of the start the target lies."""
    max_start_epoch: int = 2
    """A student starts at one of the expert's epochs from min_start_epoch to max_start_epoch - 1."""
    min_start_epoch: int = 0
    """The earliest of the expert's epochs at which a student starts."""
    batch_syn: int | None = None
    """Synthetic images per inner step, all of them by default."""
    lr_img: float = 100.0
    """Outer learning rate of the images."""
    lr_lr: float = 1e-7
    """Outer learning rate of the students' learning rate, which is learnt."""
    lr_teacher: float = 0.01
    """Initial learning rate of the students; what is learnt of it stays at a hundredth of this or above."""
    momentum: float = 0.5
    """Momentum of the outer updates, of the images and of the learning rate."""
    student_momentum: float = 0.0
    """Momentum of the students' SGD."""
    segments: int = 1
    """Students that follow a segment of an expert in an outer step; their gradients are averaged."""
    mode: Literal["exact", "first_order", "full"] = "exact"
    """How the gradient is taken: exact with little memory, first_order leaves out second derivatives, full keeps
    every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_start_epoch >= self.max_start_epoch:
            raise ValueError(f"min_start_epoch: expected less than {self.max_start_epoch}, got {self.min_start_epoch}")

    # ---- what a method may override

    def expert_options(self, epochs: int) -> dict[str, Any]:
        """Further options of `train_experts`, for experts of this many epochs."""
        return {}

    def initial_images(self, dataset: Dataset, net: nn.Module, experts: Any) -> tuple[Tensor, Tensor]:
        """Real images, ``ipc`` of each class, and their labels."""
        return dataset.sample(self.ipc, seeded_generator(self.seed, Stream.SYNTHETIC))

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        images, labels = self.initial_images(dataset, net, experts)
        lr = torch.tensor(self.lr_teacher, dtype=images.dtype, device=images.device)
        return State({"images": images, "labels": labels, "lr": lr})

    def last_start(self, iteration: int) -> int:
        """Starts are drawn from the epochs before this one."""
        return self.max_start_epoch

    def segment(self, number: int, state: State, net: nn.Module, experts: Any) -> Segment:
        """What is drawn depends on the seed, the iteration and the segment's number alone."""
        device = state["images"].device
        generator = seeded_generator(self.seed, Stream.OUTER_STEP, state.iteration, number)
        expert = int(torch.randint(experts.shape[0], (), generator=generator, device="cpu"))
        start = int(
            torch.randint(self.min_start_epoch, self.last_start(state.iteration), (), generator=generator, device="cpu")
        )
        theta0, target = (to_device(theta, device) for theta in experts.segment(expert, start, self.expert_epochs))
        return Segment(expert, start, generator, theta0, target)

    def counts(self, losses: Tensor) -> Tensor:
        """Which segments' losses [E] count in the descent."""
        return torch.ones_like(losses)

    def update(self, state: State, grads: dict[str, Tensor]) -> None:
        """Replaces the state's tensors and writes into none, so that it can be taken back."""
        state.descend("images", grads["images"], self.lr_img, self.momentum)
        state.descend("lr", grads["lr"], self.lr_lr, self.momentum)

    # ---- the outer step

    def epochs_needed(self) -> tuple[int, str]:
        """The least number of epochs of an expert, and the hyper-parameters that determine it."""
        why = f"max_start_epoch={self.max_start_epoch} and expert_epochs={self.expert_epochs}"
        return self.max_start_epoch - 1 + self.expert_epochs, why

    def check_start(self, dataset: Dataset, net: nn.Module) -> None:
        if world()[1] > self.segments:
            raise ValueError(f"segments: expected one for each of {world()[1]} ranks, got {self.segments}")

    def check(self, dataset: Dataset, net: nn.Module, experts: Trajectories | Tensor | None) -> Trajectories:
        if experts is None:
            raise ValueError(f"experts: expected trajectories, which {self.name} matches, got None")
        self.check_start(dataset, net)
        if isinstance(experts, ExpertStore):
            experts.check_whitening(dataset.zca is not None)
        epochs, why = self.epochs_needed()
        try:
            return as_trajectories(experts, net, epochs)
        except ValueError as error:
            raise ValueError(f"{error} ({why})") from error

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        rank, ranks = world()
        mine = [self.segment(number, state, net, experts) for number in range(rank, self.segments, ranks)]
        wanted = {name: state[name].detach().requires_grad_() for name in ("images", "lr")}
        labels = state["labels"]
        if labels.is_floating_point():
            wanted["labels"] = labels = labels.detach().requires_grad_()
        own = mine[0].labels is not None
        scales = torch.tensor([segment.lr_scale for segment in mine], dtype=wanted["lr"].dtype, device="cpu")
        losses = trajectory_match(
            net,
            torch.stack([segment.theta0 for segment in mine]),
            torch.stack([segment.target for segment in mine]),
            wanted["images"],
            torch.stack([cast(Tensor, segment.labels) for segment in mine]) if own else labels,
            wanted["lr"] * to_device(scales, wanted["lr"].device),
            steps=self.syn_steps,
            targets={
                t: torch.stack([cast(dict[int, Tensor], s.between)[t] for s in mine]) for t in mine[0].between or {}
            },
            batch_size=self.batch_syn,
            generator=[segment.generator for segment in mine],
            augment=self.augmentation(),
            label_kind="probs" if own else state.label_kind,
            momentum=self.student_momentum,
            mode=self.mode,
            precision=self.precision,
            memory=state.kept,
            reduction="none",
            check_finite=True,
        )
        counts = self.counts(losses.detach())
        own_grads = torch.autograd.grad((losses * counts).sum() / self.segments, list(wanted.values()))
        sums = sum_over_ranks([losses.detach().sum(), counts.sum(), *own_grads])
        loss, counted, *grads = sums
        found = dict(zip(wanted, grads, strict=True))
        before = dict(state.tensors)
        self.update(state, found)
        total, number, norm, lr = read(loss, counted, found["images"].norm(), state["lr"])
        if not number:  # taken back, which is cheaper than to wait for the number before
            state.tensors = before
            lr = state["lr"].item()
        least = LEAST_LR * self.lr_teacher
        below = {"lr_below": lr} if lr < least else {}
        if below:
            state["lr"] = state["lr"].clamp_min(least)
            lr = state["lr"].item()
        record = {"loss": total / self.segments, "lr": lr, "counted": int(number), "grad_norm": norm}
        about = {"expert": mine[0].expert, "start_epoch": mine[0].start, **state.kept_steps()}
        return record | about | below
