"""DC: dataset condensation by matching gradients.

Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021. Each iteration draws a network. In turns
the images of each class move so that their gradient in the parameters points where that of a batch of real images
does, and the network is trained on the synthetic images for some epochs. No experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pydistill.data import Dataset
from pydistill.matching import class_gradients, gradient_match
from pydistill.methods.outer import Config, State, fresh_parameters, sum_over_ranks, world
from pydistill.ops.convnet_step import Workspace
from pydistill.trajectory import FlatModule, train_students
from pydistill.trajectory.experts import seeded_generator

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # of the papers, by ipc


def rows(loops: dict[int, tuple[int, int]] = LOOPS, **more: Any) -> dict[int, dict[str, Any]]:
    """A data set's presets: numbers of outer and inner loops by ipc, and what all have."""
    return {ipc: {"outer_loop": outer, "inner_loop": inner} | more for ipc, (outer, inner) in loops.items()}


# What reaches most within minutes on two cores: fewer networks, and longer steps.
_SMALL = {"batch_real": 64, "start": "real"}
DIGITS = rows({1: (1, 1)}, iterations=150, lr_img=1.0, **_SMALL) | rows(
    {10: (5, 4)}, iterations=30, lr_img=10.0, **_SMALL
)
FASHION_MNIST = rows({1: (1, 1)}, iterations=800, lr_img=3.0, **_SMALL) | rows(
    {10: (5, 4)}, iterations=120, lr_img=10.0, **_SMALL
)


@dataclass(frozen=True)
class DC(Config):
    """Hyper-parameters under the names of the authors' code; its presets, but for the small sets."""

    name: ClassVar[str] = "dc"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": DIGITS,
        "fashion-mnist": FASHION_MNIST,
        **dict.fromkeys(("cifar10", "cifar100"), rows()),
        "tiny-imagenet": rows(),
    }

    iterations: int = 1000  # networks
    outer_loop: int = 1  # times that the images of every class are moved in an iteration
    inner_loop: int = 1  # epochs on the synthetic images between one and the next
    batch_real: int = 256  # real images of each class, or all there are
    batch_syn: int = 256  # synthetic images in a step of the network
    lr_img: float = 0.1  # outer learning rate of the images
    momentum: float = 0.5  # of their update, and of the network's
    lr_net: float = 0.01  # of the network; of students on the result, too
    start: Literal["noise", "real"] = "noise"  # what the synthetic images are at first
    distance: Literal["row_cos", "cos", "mse"] = "row_cos"  # of two gradients: `gradient_match`'s kind

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("start", ("noise", "real")), ("distance", ("row_cos", "cos", "mse"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def check(self, dataset: Dataset, net: nn.Module, experts: Any) -> None:
        if world()[1] > dataset.num_classes:
            raise ValueError(f"{self.name}: expected a class for each of {world()[1]} ranks, got {dataset.num_classes}")

    def initial(self, dataset: Dataset, net: nn.Module, experts: Any) -> State:
        generator = seeded_generator(self.seed, 5)
        images, labels = dataset.sample(self.ipc, generator)
        if self.start == "noise":
            images = torch.randn(images.shape, generator=generator).to(images)
        return State({"images": images, "labels": labels, "lr": images.new_tensor(self.lr_net)})

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        theta = fresh_parameters(net, self.seed, 7, state.iteration).to(state["images"])
        velocity, workspace, losses = None, Workspace(), []
        for turn in range(self.outer_loop):
            loss, grad = self._distance(turn, state, dataset, net, theta, workspace)
            losses.append(loss.item() / dataset.num_classes)
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
                    generator=seeded_generator(self.seed, 8, state.iteration, turn),
                    precision=self.precision,
                )
                theta, velocity = found.theta[0], found.velocity
        norm = grad.norm().item()
        return {"loss": sum(losses) / len(losses), "lr": self.lr_net, "grad_norm": norm}

    def _distance(
        self, turn: int, state: State, dataset: Dataset, net: nn.Module, theta: Tensor, workspace: Workspace
    ) -> tuple[Tensor, Tensor]:
        """Of all classes, which the ranks share, and its gradient in the images."""
        rank, ranks = world()
        mine = list(range(rank, dataset.num_classes, ranks))
        images = state["images"].detach().requires_grad_()
        pairs = [self._pair(k, turn, state.iteration, images, dataset) for k in mine]
        real, syn = zip(*pairs, strict=True)

        def gradients(parts: tuple[Tensor, ...]) -> Tensor:
            labels = torch.tensor(mine).repeat_interleave(torch.tensor([len(part) for part in parts]))
            options = {"classes": mine, "precision": self.precision, "workspace": workspace}
            return class_gradients(net, theta, torch.cat(parts), labels, **options)

        with torch.no_grad():
            target = gradients(real)
        loss = gradient_match(gradients(syn), target, kind=self.distance, shapes=FlatModule(net).shapes)
        return tuple(sum_over_ranks([loss.detach(), *torch.autograd.grad(loss, images)]))

    def _pair(self, k: int, turn: int, iteration: int, images: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Real and synthetic images of class k, augmented alike: one draw for all."""
        generator = seeded_generator(self.seed, 6, iteration, turn, k)
        members = (dataset.train_labels == k).nonzero()[:, 0]
        index = members[torch.randperm(len(members), generator=generator)[: self.batch_real].to(members.device)]
        pair = dataset.train_images[index], images[k * self.ipc : (k + 1) * self.ipc]
        augment = self.siamese()
        if augment is None:
            return pair
        record = augment.draw((1, *images.shape[1:]), generator)
        return tuple(augment(each, record.expand(len(each), -1)) for each in pair)

    def siamese(self) -> Any:
        """What augments a class's real and synthetic images alike; None: nothing."""
        return self.augmentation()
