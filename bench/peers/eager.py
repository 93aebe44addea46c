"""The inner loop as MTT, FTD, DATM and their forks write it: one autograd graph through all T steps, then backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import augment
from .problem import Problem, Result, Thunk


def unflatten(net: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """Views of the flat parameter vector under the module's parameter names."""
    named = dict(net.named_parameters())
    pieces = theta.split([p.numel() for p in named.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}


def inner_loss(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(net, unflatten(net, theta), (x,)), y)


def matching_loss(theta: Tensor, problem: Problem) -> Tensor:
    return (theta - problem.target).square().sum() / (problem.theta0 - problem.target).square().sum()


def graph_bytes(problem: Problem) -> int:
    """Bytes that autograd keeps for the loop's first step, which stay alive until the last."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    index, theta = problem.batches[0], problem.theta0.clone().requires_grad_()
    images = problem.images[index].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = inner_loss(problem.net, theta, images, problem.labels[index])
        torch.autograd.grad(loss, theta, create_graph=True)
    return sum(sizes.values())


def prepare(problem: Problem, net: nn.Module | None = None, *, first_order: bool = False) -> Thunk:
    """`net` replaces the plain ConvNet by an accelerated one with the same parameters (the drop-in level of adoption).

    `first_order=True` treats every theta_k inside the steps' gradients as a constant: by definition the estimator that
    TESLA computes, at the cost of the whole graph. It is the truth for TESLA's gate and is never timed.
    """
    net = problem.net if net is None else net

    def run() -> Result:
        images = problem.images.clone().requires_grad_()
        lr = problem.lr.clone().requires_grad_()
        theta = problem.theta0.clone().requires_grad_()
        torch.manual_seed(0)
        for k, index in enumerate(problem.batches):
            at = theta.detach().requires_grad_() if first_order else theta
            x = augment.single(images[index], *problem.draws[k]) if problem.draws else images[index]
            x = augment.drawn(x) if problem.lambdas else x
            loss = inner_loss(net, at, x, problem.labels[index])
            (gradient,) = torch.autograd.grad(loss, at, create_graph=True)
            theta = theta - lr * gradient
        loss = matching_loss(theta, problem)
        d_images, d_lr = torch.autograd.grad(loss, (images, lr))
        return Result(loss.detach(), d_images, d_lr)

    return run
