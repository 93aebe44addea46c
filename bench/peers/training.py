"""Students trained on a fixed set of images, as in evaluating a distilled set: the problem and the peers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from . import compiled
from .compiled import Parameters
from .eager import unflatten
from .plain_convnet import PlainConvNet
from .problem import make_problem


class Trained(NamedTuple):
    change: Tensor  # [E, P], theta - theta0
    losses: Tensor  # [epochs, E], the mean of each epoch's batches


Thunk = Callable[[], Trained]


@dataclass(frozen=True)
class Training:
    """E students from `theta0`, each shown the images in its own orders, by SGD with momentum and weight decay."""

    net: PlainConvNet
    theta0: Tensor  # [E, P]
    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N]
    epochs: int
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(e) for e in range(len(self.theta0))]

    def orders(self, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """The batches of each epoch."""
        for _ in range(self.epochs):
            yield torch.randperm(len(self.images), generator=generator).split(self.batch)

    def double(self) -> Training:
        wide = {name: getattr(self, name).double() for name in ("theta0", "images")}
        return replace(self, net=copy.deepcopy(self.net).double(), **wide)


def make_training(config: dict[str, Any]) -> Training:
    made = make_problem(**config | {"steps": 1})
    generator = torch.Generator().manual_seed(1)
    # networks near one initialisation, with noise of a tenth of its size: the work is that of fresh ones
    noise = torch.randn(config["students"], len(made.theta0), generator=generator, dtype=torch.float64)
    theta0 = made.theta0 + 0.1 * made.theta0.std() * noise.to(made.theta0.dtype)
    return Training(made.net, theta0, made.images, made.labels, config["epochs"], config["batch"], config["lr"])


def prepare_eager(problem: Training) -> Thunk:
    """The repositories' loop: one network after the other, torch.optim.SGD, the loss read at every step."""

    def train(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        net = copy.deepcopy(problem.net)
        vector_to_parameters(theta.clone(), net.parameters())
        sgd = {"lr": problem.lr, "momentum": problem.momentum, "weight_decay": problem.weight_decay}
        optimizer = torch.optim.SGD(net.parameters(), **sgd)
        losses = []
        for order in problem.orders(generator):
            total = 0.0
            for index in order:
                loss = F.cross_entropy(net(problem.images[index]), problem.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(index)
            losses.append(total / len(problem.images))
        return parameters_to_vector(net.parameters()).detach() - theta, theta.new_tensor(losses)

    def run() -> Trained:
        changes, losses = zip(*map(train, problem.theta0, problem.generators), strict=True)
        return Trained(torch.stack(changes), torch.stack(losses, 1))

    return run


def _step(problem: Training) -> Callable[..., tuple[Parameters, Parameters, Tensor]]:
    """A student's step as a function; the velocity of a first step is zero."""

    def loss(theta: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(compiled.logits(problem.net, theta, x), y)

    def step(theta: Parameters, velocity: Parameters, x: Tensor, y: Tensor) -> tuple[Parameters, Parameters, Tensor]:
        gradient, value = grad_and_value(loss)(theta, x, y)
        velocity = {
            name: problem.momentum * velocity[name] + gradient[name] + problem.weight_decay * p
            for name, p in theta.items()
        }
        return {name: p - problem.lr * velocity[name] for name, p in theta.items()}, velocity, value

    return step


def prepare_compiled(problem: Training) -> Thunk:
    """Channels-last, the whole step of a student in one compiled function, one student after the other."""
    step = torch.compile(_step(problem), fullgraph=True, dynamic=False)

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()

    @torch.no_grad()
    def train(start: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        theta = {name: channels_last(p) for name, p in unflatten(problem.net, start).items()}
        velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
        losses = []
        for order in problem.orders(generator):
            total = start.new_zeros(())
            for index in order:
                x, y = channels_last(problem.images[index]), problem.labels[index]
                theta, velocity, value = step(theta, velocity, x, y)
                total += value * len(index)
            losses.append(total / len(problem.images))
        return torch.cat([p.flatten() for p in theta.values()]) - start, torch.stack(losses)

    def run() -> Trained:
        changes, losses = zip(*map(train, problem.theta0, problem.generators), strict=True)
        return Trained(torch.stack(changes), torch.stack(losses, 1))

    return run


def prepare_vmapped(problem: Training) -> Thunk:
    """All students in one compiled function, by vmap. A batch of all images is shared: it needs no permutation."""
    whole = problem.batch >= len(problem.images)
    data = None if whole else 0
    step = torch.compile(vmap(_step(problem), (0, 0, data, data)), fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run() -> Trained:
        rows = [unflatten(problem.net, theta) for theta in problem.theta0]
        theta = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
        losses = []
        for orders in zip(*map(problem.orders, problem.generators), strict=True):
            total = problem.theta0.new_zeros(len(rows))
            for indices in zip(*orders, strict=True):
                index = torch.stack(indices)
                batch = (problem.images, problem.labels) if whole else (problem.images[index], problem.labels[index])
                theta, velocity, value = step(theta, velocity, *batch)
                total += value * index.shape[1]
            losses.append(total / len(problem.images))
        return Trained(torch.cat([p.flatten(1) for p in theta.values()], 1) - problem.theta0, torch.stack(losses))

    return run
