"""TESLA's two passes: constant memory, and a first-order estimator instead of the trajectory's gradient.

With g_k the gradient of step k at (theta_k, X_k), J_k = d g_k / d X_k, e = theta_T - target, D = |theta_0 - target|^2:

    dX_k = -(2 / D) lr J_k^T e          d_lr = -(2 / D) (sum_k g_k) . e

which is the true gradient without the products of (I - lr H_j) over the later steps. The published code loses the
factor 2 of the first formula (it multiplies a tuple); here it is kept, as in the paper, so that both first-order
implementations can be compared.
"""

from __future__ import annotations

import torch

from .eager import inner_loss, matching_loss
from .problem import Problem, Result, Thunk


def prepare(problem: Problem) -> Thunk:
    def run() -> Result:
        images = problem.images.clone().requires_grad_()
        lr = problem.lr
        thetas = [problem.theta0]
        gradient_sum = torch.zeros_like(problem.theta0)
        for index in problem.batches:
            theta = thetas[-1].clone().requires_grad_()
            loss = inner_loss(problem.net, theta, images[index], problem.labels[index])
            # the published code creates a graph here and drops it: kept, because the peer is what people run
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            gradient = gradient.detach()
            gradient_sum += gradient
            thetas.append(thetas[-1] - lr * gradient)

        distance = (problem.theta0 - problem.target).square().sum()
        error = thetas[-1] - problem.target
        d_images = torch.zeros_like(problem.images)
        for theta, index in zip(thetas, problem.batches, strict=False):
            theta = theta.clone().requires_grad_()
            x = problem.images[index].requires_grad_()
            loss = inner_loss(problem.net, theta, x, problem.labels[index])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            (d_x,) = torch.autograd.grad(error @ gradient, x)
            d_images.index_add_(0, index, d_x, alpha=float(-2 * lr / distance))
        return Result(matching_loss(thetas[-1], problem), d_images, -2 / distance * (gradient_sum @ error))

    return run
