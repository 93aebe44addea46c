"""The problem that every provider solves: the trajectory-matching loss and its gradients for one segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .augment import draw_single
from .plain_convnet import PlainConvNet
from .plain_networks import NETWORKS


class Result(NamedTuple):
    loss: Tensor  # [], |theta_T - target|^2 / |theta_0 - target|^2
    d_images: Tensor  # [N, C, H, W]
    d_lr: Tensor  # []


Thunk = Callable[[], Result]


@dataclass(frozen=True)
class Problem:
    """T steps of plain SGD from `theta0` on `images`, step k seeing `images[batches[k]]`, matched with `target`."""

    net: nn.Module  # a PlainConvNet, or one of NETWORKS
    theta0: Tensor  # [P], in net.parameters() order
    target: Tensor  # [P]
    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N], long
    lr: Tensor  # []
    batches: tuple[Tensor, ...]  # T index tensors
    draws: tuple[tuple[str, Tensor], ...] = ()  # each step's augmentation: operation and record; empty: none
    lambdas: bool = False  # whether each step is augmented by a function that draws from torch's generator

    @property
    def steps(self) -> int:
        return len(self.batches)

    def with_steps(self, steps: int) -> Problem:
        return replace(self, batches=self.batches[:steps], draws=self.draws[:steps])


def make_problem(
    *,
    channels: int,
    classes: int,
    image_size: int,
    images: int,
    batch: int,
    steps: int,
    dtype: torch.dtype = torch.float32,
    lr: float = 0.01,
    seed: int = 0,
    augment: bool = False,
    lambdas: bool = False,
    kind: dict[str, Any] | None = None,
    network: str | None = None,
    width: int = 0,
    depth: int = 0,
    **_: Any,
) -> Problem:
    """Drawn in float64 and rounded to `dtype`, so that the same seed gives the same problem in every precision.

    The net is one of `NETWORKS`, or else a ConvNet of ``width`` and ``depth``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network is None:
            net: nn.Module = PlainConvNet(channels, classes, width, depth, image_size, **(kind or {}))
        else:
            net = NETWORKS[network](channels, classes)
    generator = torch.Generator().manual_seed(seed)
    theta0 = torch.nn.utils.parameters_to_vector(net.parameters()).detach().double()
    # a random direction of an expert segment's length: it weights every parameter, so no term of the gradient can hide
    target = theta0 + 0.01 * torch.randn(theta0.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(images, channels, image_size, image_size, generator=generator, dtype=torch.float64)
    # chunks of permutations, without replacement until used up, as the trajectory repos draw them
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches.extend(torch.randperm(images, generator=generator).split(batch))
    shapes = [(len(index), channels, image_size, image_size) for index in batches[:steps]]
    return Problem(
        net=net.to(dtype),
        theta0=theta0.to(dtype),
        target=target.to(dtype),
        images=x.to(dtype),
        labels=torch.arange(images) % classes,
        lr=torch.tensor(lr, dtype=dtype),
        batches=tuple(batches[:steps]),
        draws=tuple(draw_single(shape, k) for k, shape in enumerate(shapes)) if augment else (),
        lambdas=lambdas,
    )
