"""DM: dataset condensation by matching distributions.

Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023. Each iteration draws a network that is
never trained, and moves the synthetic images of every class so that their mean embedding comes closer to that of a
batch of real ones, both under one augmentation. No experts, no second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydistill._devices import read, to_device
from pydistill.data import Dataset
from pydistill.matching import class_mean_match, features
from pydistill.methods.config import PHOTOGRAPHS
from pydistill.methods.matching.pairs import ClassPairs, Pairs
from pydistill.methods.outer import State, fresh_parameters
from pydistill.methods.ranks import sum_over_ranks
from pydistill.ops.convnet_step import Workspace
from pydistill.seeding import Stream

DIGITS = {"augment": "color_crop_cutout_scale_rotate"}  # a mirrored digit is not a digit
_SMALL = {"iterations": 300, "batch_real": 64}


@dataclass(frozen=True)
class DM(ClassPairs):
    """The hyper-parameters of the authors' code, except for the small sets."""

    name: ClassVar[str] = "dm"
    about: ClassVar[str] = "match mean features"
    paper: ClassVar[str] = "Zhao and Bilen, WACV 2023"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": dict.fromkeys((1, 10), _SMALL | DIGITS),
        "fashion-mnist": dict.fromkeys((1, 10), _SMALL),
        **{name: {1: {}, 10: {}, 50: {}} for name in ("cifar10", "cifar100", "tiny-imagenet")},
    }

    iterations: int = 20000
    """Iterations, each with a new network."""
    augment: str = field(default=PHOTOGRAPHS, kw_only=True)
    """Differentiable siamese augmentation of a class's real and synthetic images alike: operations joined by _."""

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        images = state["images"].detach().requires_grad_()
        classes = self.own_classes(dataset)
        pairs = self.pairs(classes, images, dataset, state.iteration)
        theta = fresh_parameters(net, self.seed, Stream.OUTER_STEP_NET, state.iteration, like=images)
        loss = self.distance(net, theta, pairs, dataset.num_classes)
        loss, grad = sum_over_ranks([loss.detach(), *torch.autograd.grad(loss, images)])
        state.descend("images", grad, self.lr_img, self.momentum)
        total, norm = read(loss, grad.norm())
        return {"loss": total / dataset.num_classes, "lr": self.lr_net, "grad_norm": norm}

    def distance(self, net: nn.Module, theta: Tensor, pairs: Pairs, num_classes: int) -> Tensor:
        """What is minimised, summed over the pairs' classes."""
        workspace = Workspace()
        with torch.no_grad():
            real = features(net, theta, pairs.real, axis=None, precision=self.precision, workspace=workspace)
        synthetic = features(net, theta, pairs.synthetic, axis=None, workspace=workspace)
        labels = [to_device(labels, theta.device) for labels in (pairs.labels_real, pairs.labels_synthetic)]
        return class_mean_match(real.embedding, synthetic.embedding, *labels, num_classes=num_classes)
