"""RaT-BPTT: backpropagation through a randomly placed window of training.

Feng, Vedantam, Kempe, "Embarrassingly Simple Dataset Distillation", ICLR 2024. Each iteration trains a fresh student by
Adam on the synthetic images; only the last ``window`` of its steps are differentiated, after a warm-up of newly drawn
length. The images (and labels) then move down the gradient of the student's loss on real images. No experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import read, to_device
from pydistill.data import Dataset
from pydistill.methods.config import Config
from pydistill.methods.outer import State, fresh_parameters
from pydistill.methods.ranks import sum_over_ranks, world
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import Adam, FlatModule, unroll
from pydistill.trajectory.optimizers import State as Moving


def _row(window: int, total: int, **more: Any) -> dict[str, Any]:
    return {"window": window, "total": total, "iterations": 60000, "augment": "flip_rotate"} | more


_SMALL = {
    "window": 10,
    "total": 20,
    "iterations": 100,
    "lr_img": 0.05,
    "lr_inner": 0.005,
    "batch_real": 256,
    "start": "real",
}


@dataclass(frozen=True)
class RaTBPTT(Config):
    """The paper's hyper-parameters."""

    name: ClassVar[str] = "rat_bptt"
    about: ClassVar[str] = "backpropagate through a window of a student's training"
    paper: ClassVar[str] = "Feng, Vedantam, Kempe, ICLR 2024"
    student_lr: ClassVar[str] = "lr_eval"
    streams: ClassVar[bool] = True
    may_be_zero: ClassVar[tuple[str, ...]] = ("seed",)
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": {1: _SMALL, 10: _SMALL},
        "fashion-mnist": {1: _SMALL, 10: _SMALL},
        "cifar10": {10: _row(60, 200, batch_per_class=10, zca=True)},
        "cifar100": {
            1: _row(90, 130, lr_img=3e-4, learn_labels=True, zca=True),
            10: _row(100, 300, learn_labels=True, zca=True),
        },
        "tiny-imagenet": {10: _row(100, 300, lr_img=3e-4, classes=50, learn_labels=True, batch_real=1000)},
    }

    window: int = 60
    """Steps of a student's training that are differentiated."""
    total: int = 200
    """Most steps of a student; the window begins at one of the first total - window + 1."""
    lr_inner: float = 1e-3
    """Learning rate of the students' Adam."""
    lr_img: float = 1e-3
    """Outer learning rate of Adam on the images, and on the labels if they are learnt."""
    batch_real: int = 5000
    """Real images that a student is tested on in an iteration."""
    batch_per_class: int = 1
    """Synthetic images of a class in each step."""
    classes: int | None = None
    """Classes in each step, all by default."""
    learn_labels: bool = False
    """Learn the labels, too."""
    clip: float = 2.0
    """Largest norm of the images' gradient, relative to its moving average."""
    clip_decay: float = 0.9
    """Decay of the moving average of the gradient's norm."""
    start: Literal["noise", "real"] = "noise"
    """What the synthetic images are at first: noise, or real images."""
    segments: int = 1
    """Students in an iteration, whose gradients are averaged."""
    lr_eval: float = 0.01
    """Learning rate of SGD students on the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total < self.window:
            raise ValueError(f"total: expected at least the window of {self.window}, got {self.total}")

    def check(self, dataset: Dataset, net: nn.Module, experts: Any) -> None:
        if world()[1] > self.segments:
            raise ValueError(f"segments: expected one for each of {world()[1]} ranks, got {self.segments}")
        if (self.classes or 1) > dataset.num_classes:
            raise ValueError(f"classes: expected at most the {dataset.num_classes} there are, got {self.classes}")

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        images, labels = self.first_images(dataset, self.start)
        if self.learn_labels:
            labels = F.one_hot(labels, dataset.num_classes).to(images.dtype)
        lr = torch.tensor(self.lr_eval, dtype=images.dtype, device=images.device)
        return State({"images": images, "labels": labels, "lr": lr}, "probs" if self.learn_labels else "hard")

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        rank, ranks = world()
        names = ["images", "labels"] if self.learn_labels else ["images"]
        sums = [state["images"].new_zeros(()), *(torch.zeros_like(state[name]) for name in names)]
        for number in range(rank, self.segments, ranks):
            wanted = {name: state[name].detach().requires_grad_() for name in names}
            loss = self._student_loss(number, state, wanted, dataset, net)
            parts = torch.autograd.grad(loss / self.segments, list(wanted.values()))
            sums = [a + b for a, b in zip(sums, [loss.detach() / self.segments, *parts], strict=True)]
        loss, *grads = sum_over_ranks(sums)
        norm = grads[0].norm()
        if "norm" not in state.tensors:
            state["norm"] = norm
        state["norm"] = torch.lerp(norm, state["norm"], self.clip_decay)
        grads[0] = grads[0] * (self.clip * state["norm"] / norm.clamp_min(1e-30)).clamp_max(1)
        for name, grad in zip(names, grads, strict=True):
            self._adam(state, name, grad)
        if self.learn_labels:
            state["labels"] = state["labels"].clamp_min(0)
        found, length = read(loss, norm)
        return {"loss": found, "lr": self.lr_inner, "grad_norm": length, **state.kept_steps()}

    def _student_loss(
        self, number: int, state: State, wanted: dict[str, Tensor], dataset: Dataset, net: nn.Module
    ) -> Tensor:
        generator = seeded_generator(self.seed, Stream.OUTER_STEP, state.iteration, number)
        warmup = int(torch.randint(self.total - self.window + 1, (), generator=generator, device="cpu"))
        augment = self.augmentation()  # of the real images, too
        images = wanted["images"]
        theta = unroll(
            net,
            fresh_parameters(net, self.seed, Stream.OUTER_STEP_NET, state.iteration, number, like=images),
            images,
            wanted.get("labels", state["labels"]),
            self.lr_inner,
            steps=warmup + self.window,
            warmup=warmup,
            batches=[self._batch(dataset.num_classes, generator) for _ in range(warmup + self.window)],
            generator=generator,
            augment=augment,
            label_kind=state.label_kind,
            optimizer=Adam(),
            precision=self.precision,
            memory=state.kept,
            check_finite=True,
        )
        real = torch.randperm(len(dataset.train_images), generator=generator, device="cpu")[: self.batch_real]
        real = to_device(real, images.device)
        x, y = dataset.train_images[real], dataset.train_labels[real]
        if augment is not None:
            x = augment(x, augment.draw(x.shape, generator))
        return F.cross_entropy(FlatModule(net)(theta, x), y)

    def _batch(self, num_classes: int, generator: torch.Generator) -> Tensor:
        """Some images of each of some classes."""
        classes = torch.randperm(num_classes, generator=generator, device="cpu")[: self.classes].sort().values
        of_class = [
            torch.randperm(self.ipc, generator=generator, device="cpu")[: self.batch_per_class] for _ in classes
        ]
        return (torch.stack(of_class) + self.ipc * classes[:, None]).flatten()

    def _adam(self, state: State, name: str, grad: Tensor) -> None:
        names = [f"{name}_moment{i}" for i in (1, 2)]
        moments = tuple(state[each] for each in names if each in state.tensors)
        found = Adam().step(
            state.iteration, Moving(state[name], moments), grad, torch.tensor(self.lr_img, device="cpu")
        )
        state.tensors |= {name: found.theta, **dict(zip(names, found.moments, strict=True))}
