"""An outer step of DC: every class's gradient on real and on synthetic images, their distance, its image gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap
from torch.nn.utils import vector_to_parameters

from . import compiled
from .compiled import Parameters
from .eager import unflatten
from .plain_convnet import PlainConvNet
from .problem import make_problem


class Matched(NamedTuple):
    loss: Tensor  # [], the sum over the classes
    d_images: Tensor  # [K * ipc, C, H, W], of the synthetic images


Thunk = Callable[[], Matched]


@dataclass(frozen=True)
class Matching:
    """Classes in order, with equal numbers of images."""

    net: PlainConvNet
    theta: Tensor  # [P]
    real: Tensor  # [K, B, C, H, W]
    syn: Tensor  # [K, ipc, C, H, W]

    def labels(self, images: Tensor) -> Tensor:
        """[K, images of a class]"""
        return torch.arange(len(images))[:, None].expand(images.shape[:2]).contiguous()

    def double(self) -> Matching:
        wide = {name: getattr(self, name).double() for name in ("theta", "real", "syn")}
        return replace(self, net=copy.deepcopy(self.net).double(), **wide)


def make_matching(config: dict[str, Any]) -> Matching:
    K, B, ipc = config["classes"], config["batch_real"], config["ipc"]
    made = make_problem(**config | {"steps": 1, "images": K * (B + ipc), "batch": K})
    real, syn = made.images.split([K * B, K * ipc])
    return Matching(made.net, made.theta0, real.unflatten(0, (K, B)), syn.unflatten(0, (K, ipc)))


def match_loss(syn: list[Tensor], real: list[Tensor]) -> Tensor:
    """The repositories' distance: 1 - cosine of every output row of every weight."""
    total = syn[0].new_zeros(())
    for s, r in zip(syn, real, strict=True):
        if s.dim() > 1:
            s, r = s.flatten(1), r.flatten(1)
            total = total + (1 - (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + 0.000001)).sum()
    return total


def prepare_eager(problem: Matching) -> Thunk:
    """The repositories' loop: class by class, all their graphs alive until one backward."""
    net = copy.deepcopy(problem.net)
    vector_to_parameters(problem.theta.clone(), net.parameters())
    parameters = list(net.parameters())

    def run() -> Matched:
        images = problem.syn.clone().requires_grad_()
        loss = problem.theta.new_zeros(())
        for k, (x, y) in enumerate(zip(problem.real, problem.labels(problem.real), strict=True)):
            real = [g.detach() for g in torch.autograd.grad(F.cross_entropy(net(x), y), parameters)]
            syn_loss = F.cross_entropy(net(images[k]), problem.labels(images)[k])
            loss = loss + match_loss(list(torch.autograd.grad(syn_loss, parameters, create_graph=True)), real)
        loss.backward()
        return Matched(loss.detach(), images.grad.flatten(0, 1))

    return run


def _class_loss(problem: Matching) -> Callable[..., Tensor]:
    def loss(theta: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(compiled.logits(problem.net, theta, x), y)

    return loss


def _distance(gradient: Parameters, real: Parameters) -> Tensor:
    return match_loss(list(gradient.values()), list(real.values()))


def _through(problem: Matching) -> Callable[..., tuple[Tensor, Tensor]]:
    """The distance of one class and its image gradient, through the backward pass."""
    loss = _class_loss(problem)

    def step(theta: Parameters, x: Tensor, y: Tensor, real: Parameters) -> tuple[Tensor, Tensor]:
        d_images, value = grad_and_value(lambda x: _distance(grad(loss)(theta, x, y), real))(x)
        return value, d_images

    return step


def _along(problem: Matching) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same in two compiled functions, forward over reverse: the image gradient's derivative along d distance /
    d gradient. One function for both fails in torch 2.13, whose tangents must have the parameters' layout."""
    loss = _class_loss(problem)

    @torch.compile(fullgraph=True, dynamic=False)
    def direction(theta: Parameters, x: Tensor, y: Tensor, real: Parameters) -> tuple[Parameters, Tensor]:
        return grad_and_value(_distance)(grad(loss)(theta, x, y), real)

    @torch.compile(fullgraph=True, dynamic=False)
    def image_gradient(theta: Parameters, x: Tensor, y: Tensor, along: Parameters) -> Tensor:
        along = {name: 1.0 * part for name, part in along.items()}  # torch does not accept an input itself as a tangent
        _, (_, d_images) = jvp(lambda theta: grad(loss, argnums=(0, 1))(theta, x, y), (theta,), (along,))
        return d_images

    def step(theta: Parameters, x: Tensor, y: Tensor, real: Parameters) -> tuple[Tensor, Tensor]:
        found, value = direction(theta, x, y, real)
        along = {name: torch.empty_like(theta[name]).copy_(part) for name, part in found.items()}
        return value, image_gradient(theta, x, y, along)

    return step


def prepare_compiled(problem: Matching, through: bool = False) -> Thunk:
    """Class by class, channels-last, each side compiled."""
    torch._dynamo.config.recompile_limit = 64
    real_step = torch.compile(grad(_class_loss(problem)), fullgraph=True, dynamic=False)
    syn_step = torch.compile(_through(problem), fullgraph=True, dynamic=False) if through else _along(problem)
    lay_out = compiled._channels_last

    @torch.no_grad()
    def run() -> Matched:
        # copies: torch does not accept tangents for parameters that are views
        theta = {name: lay_out(p).clone() for name, p in unflatten(problem.net, problem.theta).items()}
        real_labels, syn_labels = problem.labels(problem.real), problem.labels(problem.syn)
        losses, d_images = [], []
        for k in range(len(problem.syn)):
            real = real_step(theta, lay_out(problem.real[k]), real_labels[k])
            value, d_x = syn_step(theta, lay_out(problem.syn[k]), syn_labels[k], real)
            losses.append(value)
            d_images.append(d_x)
        return Matched(torch.stack(losses).sum(), torch.cat(d_images))

    return run


def prepare_vmapped(problem: Matching) -> Thunk:
    """All classes in one compiled function per side, by vmap, under which torch has no forward over reverse."""
    torch._dynamo.config.recompile_limit = 64
    real_step = torch.compile(vmap(grad(_class_loss(problem)), (None, 0, 0)), fullgraph=True, dynamic=False)
    syn_step = torch.compile(vmap(_through(problem), (None, 0, 0, 0)), fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run() -> Matched:
        theta = unflatten(problem.net, problem.theta)
        real = real_step(theta, problem.real, problem.labels(problem.real))
        losses, d_images = syn_step(theta, problem.syn, problem.labels(problem.syn), real)
        return Matched(losses.sum(), d_images.flatten(0, 1))

    return run
