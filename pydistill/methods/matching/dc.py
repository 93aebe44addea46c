"""DC: dataset condensation by matching gradients.

Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021. Each iteration draws a network. In turn,
the images of each class move so that their gradient in the parameters points the same way as that of a batch of real
images, and the network is trained on the synthetic images for some epochs. No experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydistill._devices import read
from pydistill.data import Dataset
from pydistill.matching import class_gradients, gradient_match
from pydistill.methods.matching.pairs import ClassPairs
from pydistill.methods.outer import State, fresh_parameters
from pydistill.methods.ranks import sum_over_ranks
from pydistill.ops.convnet_step import Workspace
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule, train_students

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # of the papers, by ipc


def rows(loops: dict[int, tuple[int, int]] = LOOPS, **more: Any) -> dict[int, dict[str, Any]]:
    """A data set's presets: numbers of outer and inner loops by ipc, and options common to all."""
    return {ipc: {"outer_loop": outer, "inner_loop": inner} | more for ipc, (outer, inner) in loops.items()}


# What works best within minutes on two cores: fewer networks and longer steps.
_SMALL = {"batch_real": 64, "start": "real"}
DIGITS = rows({1: (1, 1)}, iterations=150, lr_img=1.0, **_SMALL) | rows(
    {10: (5, 4)}, iterations=30, lr_img=10.0, **_SMALL
)
FASHION_MNIST = rows({1: (1, 1)}, iterations=200, lr_img=3.0, **_SMALL) | rows(
    {10: (5, 4)}, iterations=30, lr_img=10.0, **_SMALL
)


@dataclass(frozen=True)
class DC(ClassPairs):
    """Hyper-parameters under the names of the authors' code; its presets, except for the small sets."""

    name: ClassVar[str] = "dc"
    about: ClassVar[str] = "match gradients"
    paper: ClassVar[str] = "Zhao, Mopuri, Bilen, ICLR 2021"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": DIGITS,
        "fashion-mnist": FASHION_MNIST,
        **dict.fromkeys(("cifar10", "cifar100"), rows()),
        "tiny-imagenet": rows(),
    }

    iterations: int = 1000
    """Iterations, each with a new network."""
    outer_loop: int = 1
    """Times that the images of every class are moved in an iteration."""
    inner_loop: int = 1
    """Epochs of the network on the synthetic images after each move of the images."""
    batch_real: int = 256
    """Real images of each class in an iteration, or all there are if fewer."""
    batch_syn: int = 256
    """Synthetic images in a step of the network."""
    lr_img: float = 0.1
    """Outer learning rate of the images."""
    momentum: float = 0.5
    """Momentum of the images' update, and of the network's."""
    lr_net: float = 0.01
    """Learning rate of the network, and of students on the result."""
    start: Literal["noise", "real"] = "noise"
    """What the synthetic images are at first: noise, or real images."""
    distance: Literal["row_cos", "cos", "mse"] = "row_cos"
    """Distance of two gradients: row_cos sums over the rows of each weight, cos and mse take all as one vector."""

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        theta = fresh_parameters(net, self.seed, Stream.OUTER_STEP_NET, state.iteration, like=state["images"])
        velocity, workspace, losses = None, Workspace(), []
        for turn in range(self.outer_loop):
            loss, grad = self._distance(turn, state, dataset, net, theta, workspace)
            losses.append(loss)
            state.descend("images", grad, self.lr_img, self.momentum)
            if turn < self.outer_loop - 1:
                found = train_students(
                    net,
                    theta[None],
                    state["images"],
                    state["labels"],
                    epochs=self.inner_loop,
                    lr=self.lr_net,
                    batch_size=self.batch_syn,
                    momentum=self.momentum,
                    velocity0=velocity,
                    augment=self.augmentation(),
                    generator=seeded_generator(self.seed, Stream.INNER_TRAINING, state.iteration, turn),
                    precision=self.precision,
                    check_finite=not theta.is_cuda,  # there it is seen in the loss, which is read at the end
                )
                theta, velocity = found.theta[0], found.velocity
        *totals, norm = read(*losses, grad.norm())
        mean = sum(total / dataset.num_classes for total in totals) / len(totals)
        return {"loss": mean, "lr": self.lr_net, "grad_norm": norm}

    def _distance(
        self, turn: int, state: State, dataset: Dataset, net: nn.Module, theta: Tensor, workspace: Workspace
    ) -> tuple[Tensor, Tensor]:
        """The distance over all classes, which the ranks share, and its gradient in the images."""
        classes = self.own_classes(dataset)
        images = state["images"].detach().requires_grad_()
        pairs = self.pairs(classes, images, dataset, state.iteration, turn)
        gradients = partial(class_gradients, net, theta, classes=classes, precision=self.precision, workspace=workspace)
        with torch.no_grad():
            target = gradients(pairs.real, pairs.labels_real)
        grads = gradients(pairs.synthetic, pairs.labels_synthetic)
        loss = gradient_match(grads_real=target, grads_syn=grads, kind=self.distance, shapes=FlatModule(net).shapes)
        distance, grad = sum_over_ranks([loss.detach(), *torch.autograd.grad(loss, images)])
        return distance, grad
