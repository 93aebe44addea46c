"""The best a skilled user gets without pydistill: the exact adjoint sweep in torch.func, each step under torch.compile.

Chosen on a 2-core AVX-512 CPU in fp32 (ConvNet-D3-128, B=100, T=2, 32x32; the seconds are one inner step, both sweeps):

    0.67-0.70  jvp of the step's gradient, norm written out, channels-last parameters and images   <- this file
    0.70       the same over one flat parameter vector, its views cut inside the compiled step
    0.73-0.93  vjp of the step's gradient, norm written out
    0.77       vjp of the step's gradient through nn.GroupNorm

max-autotune and cpp_wrapper made no difference beyond the noise (tried on a busy machine only). The forward-mode
derivative keeps to ordinary convolution shapes, whereas the double backward of a convolution swaps batch and channels;
the norm is written out because torch's forward-mode formula for `group_norm` fails on channels-last inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp

from .eager import matching_loss, unflatten
from .plain_convnet import PlainConvNet
from .problem import Problem, Result, Thunk

Parameters = dict[str, Tensor]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, over: tuple[int, ...] = (2, 3)) -> Tensor:
    """``over``: (0, 2, 3) makes it a batch norm."""
    centred = x - x.mean(over, keepdim=True)
    scale = weight[:, None, None] * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    return centred * scale + bias[:, None, None]


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    apart = x.unflatten(1, (groups, -1))
    centred = apart - apart.mean((2, 3, 4), keepdim=True)
    h = centred * torch.rsqrt(centred.square().mean((2, 3, 4), keepdim=True) + eps)
    return h.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def logits(net: PlainConvNet, theta: Parameters, x: Tensor) -> Tensor:
    """The plain ConvNet's forward with its norm in elementary operations."""
    for i, layer in enumerate(net.features):
        name = f"features.{i}"
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, theta[f"{name}.weight"], theta[f"{name}.bias"], padding=layer.padding)
        elif isinstance(layer, (nn.GroupNorm, nn.BatchNorm2d)):
            affine = (theta[f"{name}.weight"], theta[f"{name}.bias"], layer.eps)
            if isinstance(layer, nn.BatchNorm2d):
                x = instance_norm(x, *affine, over=(0, 2, 3))
            elif layer.num_groups < layer.num_channels:
                x = group_norm(x, layer.num_groups, *affine)
            else:
                x = instance_norm(x, *affine)
        elif isinstance(layer, nn.ReLU):
            x = F.relu(x)
        else:
            x = layer(x)
    return F.linear(x.flatten(1), theta["classifier.weight"], theta["classifier.bias"])


def prepare(problem: Problem, half: bool = False, channels_last: bool = True) -> Thunk:
    """``half``: under bf16 autocast, used as torch intends: around the forward pass."""
    # torch counts compilations per source line, and a run compiles these lines at many sizes and in three ways
    torch._dynamo.config.recompile_limit = 64
    net = problem.net
    lay_out = _channels_last if channels_last else Tensor.contiguous

    def loss(theta: Parameters, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            found = logits(net, theta, x)
        return F.cross_entropy(found.to(x.dtype), y)

    @torch.compile(fullgraph=True, dynamic=False)
    def step(theta: Parameters, x: Tensor, y: Tensor, lr: Tensor) -> Parameters:
        gradient = grad(loss)(theta, x, y)
        return {name: theta[name] - lr * gradient[name] for name in theta}

    @torch.compile(fullgraph=True, dynamic=False)
    def adjoint_step(
        theta: Parameters, x: Tensor, y: Tensor, lr: Tensor, adjoint: Parameters
    ) -> tuple[Parameters, Tensor, Tensor]:
        # along nu, the derivative of [d loss / d theta, d loss / d x] is [H nu, d <d loss / d theta, nu> / d x]
        nu = {name: -lr * a for name, a in adjoint.items()}
        (gradient, _), (d_theta, d_x) = jvp(lambda theta: grad(loss, argnums=(0, 1))(theta, x, y), (theta,), (nu,))
        d_lr = -sum((adjoint[name] * gradient[name]).sum() for name in adjoint)
        return {name: adjoint[name] + d_theta[name] for name in adjoint}, d_x, d_lr

    def named(theta: Tensor) -> Parameters:
        return {name: lay_out(p) for name, p in unflatten(net, theta).items()}

    @torch.no_grad()
    def run() -> Result:
        thetas = [named(problem.theta0)]
        for index in problem.batches:
            x = lay_out(problem.images[index])
            thetas.append(step(thetas[-1], x, problem.labels[index], problem.lr))

        theta = torch.cat([p.flatten() for p in thetas.pop().values()])
        distance = (problem.theta0 - problem.target).square().sum()
        adjoint = named(2 * (theta - problem.target) / distance)
        d_images = torch.zeros_like(problem.images)
        d_lr = torch.zeros_like(problem.lr)
        for index in reversed(problem.batches):
            x = lay_out(problem.images[index])
            adjoint, d_x, d_lr_step = adjoint_step(thetas.pop(), x, problem.labels[index], problem.lr, adjoint)
            d_images.index_add_(0, index, d_x)
            d_lr += d_lr_step
        return Result(matching_loss(theta, problem), d_images, d_lr)

    return run
