"""pydistill's providers, in the same shape as the peers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import eager, training
from bench.peers.problem import Problem, Result, Thunk


def accelerated(net: nn.Module) -> nn.Module:
    # imported late, so that the peers can be run and compared without pydistill
    from pydistill.nn import accelerate

    return accelerate(copy.deepcopy(net))


def eager_accelerated(problem: Problem) -> Thunk:
    return eager.prepare(problem, accelerated(problem.net))


def trajectory_match(problem: Problem, mode: str) -> Thunk:
    import pydistill

    net = accelerated(problem.net)

    def run() -> Result:
        images = problem.images.clone().requires_grad_()
        lr = problem.lr.clone().requires_grad_()
        loss = pydistill.trajectory_match(
            net,
            problem.theta0,
            problem.target,
            images,
            problem.labels,
            lr,
            steps=problem.steps,
            batches=list(problem.batches),
            mode=mode,
        )
        d_images, d_lr = torch.autograd.grad(loss, (images, lr))
        return Result(loss.detach(), d_images, d_lr)

    return run


def exact(problem: Problem) -> Thunk:
    return trajectory_match(problem, "exact")


def first_order(problem: Problem) -> Thunk:
    return trajectory_match(problem, "first_order")


def instance_norm_relu_avg_pool(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    import pydistill

    return pydistill.instance_norm_relu_avg_pool(x, weight, bias, **options)


def train_students(problem: training.Training) -> training.Thunk:
    import pydistill

    def run() -> training.Trained:
        found = pydistill.train_students(
            problem.net,
            problem.theta0,
            problem.images,
            problem.labels,
            epochs=problem.epochs,
            batch_size=problem.batch,
            lr=problem.lr,
            momentum=problem.momentum,
            weight_decay=problem.weight_decay,
            generator=problem.generators,
        )
        return training.Trained(found.theta - problem.theta0, found.losses)

    return run
