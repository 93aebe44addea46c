"""The definition of the ConvNet step: autograd on plain torch, one student at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.reference.attention_map import attention_map
from pydistill.reference.convnet_shape import ConvNetShape

Axis = Literal["spatial", "channel", "both"]


def _activations(shape: ConvNetShape, parameters: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every block's activation before its pool, and what the last pool leaves."""
    found = []
    for i, layer in enumerate(shape.layers):
        filters, shift, scale, offset = parameters[4 * i : 4 * i + 4]
        z = F.conv2d(x, filters, shift, padding=layer.padding)
        found.append(F.relu(F.group_norm(z, layer.out_channels, scale, offset, shape.eps)))
        x = F.avg_pool2d(found[-1], 2)
    return found, x.flatten(1)


def _net(shape: ConvNetShape, parameters: list[Tensor], x: Tensor) -> Tensor:
    return F.linear(_activations(shape, parameters, x)[1], *parameters[-2:])


def _loss(shape: ConvNetShape, theta: Tensor, x: Tensor, y: Tensor, label_kind: str) -> Tensor:
    parameters = [p[0] for p in shape.slices(theta[None])]
    return F.cross_entropy(_net(shape, parameters, x), y.softmax(1) if label_kind == "logits" else y)


def _of_student(tensor: Tensor, e: int, shared_dims: int) -> Tensor:
    return tensor if tensor.dim() == shared_dims else tensor[e]


def convnet_logits(shape: ConvNetShape, theta: Tensor, images: Tensor) -> Tensor:
    return torch.stack(
        [
            _net(shape, [p[0] for p in shape.slices(t[None])], _of_student(images, e, 4))
            for e, t in enumerate(theta.detach())
        ]
    )


def convnet_features(
    shape: ConvNetShape, theta: Tensor, images: Tensor, p: float, attended: Sequence[int], axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each student: the attention maps of the attended blocks side by side, and the embedding; differentiable."""
    found = []
    for e, row in enumerate(theta):
        parameters = [part[0] for part in shape.slices(row[None])]
        activations, embedding = _activations(shape, parameters, _of_student(images, e, 4))
        maps = [attention_map(activations[block], p, "both") for block in attended]
        none = embedding[:, :0]
        spatial = torch.cat([none, *(m[0] for m in maps if axis != "channel")], 1)
        channel = torch.cat([none, *(m[1] for m in maps if axis != "spatial")], 1)
        found.append((spatial, channel, embedding))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def convnet_gradient(
    shape: ConvNetShape, theta: Tensor, images: Tensor, labels: Tensor, label_kind: str
) -> tuple[Tensor, Tensor]:
    found = []
    with torch.enable_grad():
        for e, row in enumerate(theta):
            t = row.detach().requires_grad_()
            y = _of_student(labels, e, 1 if label_kind == "hard" else 2)
            loss = _loss(shape, t, _of_student(images, e, 4), y, label_kind)
            found.append((loss.detach(), torch.autograd.grad(loss, t)[0]))
    losses, grads = zip(*found, strict=True)
    return torch.stack(losses), torch.stack(grads)


def convnet_tangent(
    shape: ConvNetShape, theta: Tensor, direction: Tensor, images: Tensor, labels: Tensor, label_kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    soft = label_kind != "hard"
    found = []
    with torch.enable_grad():
        for e, row in enumerate(theta):
            t = row.detach().requires_grad_()
            x = _of_student(images, e, 4).detach().requires_grad_()
            y = _of_student(labels, e, 2 if soft else 1).detach().requires_grad_(soft)
            (g,) = torch.autograd.grad(_loss(shape, t, x, y, label_kind), t, create_graph=True)
            slope = (g * direction[e]).sum()
            inputs = (t, x, y) if soft else (t, x)
            found.append((slope.detach(), *torch.autograd.grad(slope, inputs)))
    slope, curvature, images_grad, *labels_grad = (torch.stack(parts) for parts in zip(*found, strict=True))
    return slope, curvature, images_grad, labels_grad[0] if soft else None
