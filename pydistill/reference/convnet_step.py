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


class Statistics:
    """Statistics of a student's norms over batches: running ones are read, those of a batch are gathered."""

    def __init__(self, running: Tensor | None, e: int):
        own = running is not None and running.dim() == 3
        self.running = running[e] if own else running  # [2, channels of all blocks]: means and variances
        self.batch: list[Tensor] = []  # [2, channels] of each block, biased variances

    def of_block(self, shape: ConvNetShape, block: int) -> tuple[Tensor, Tensor]:
        return tuple(self.running.split(list(shape.widths), 1)[block])


_ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "swish": F.silu}
_POOLS = {"avg": F.avg_pool2d, "max": F.max_pool2d}


def _activations(
    shape: ConvNetShape, parameters: list[Tensor], x: Tensor, statistics: Statistics
) -> tuple[list[Tensor], Tensor]:
    """Every block's activation before its pool, and the output of the last pool."""
    found, rest = [], iter(parameters)
    for i, layer in enumerate(shape.layers):
        filters, shift = next(rest), next(rest) if shape.biased else None
        z = F.conv2d(x, filters, shift, padding=layer.padding)
        affine = (next(rest), next(rest)) if shape.norm != "none" else ()
        if shape.norm == "instance":
            z = F.group_norm(z, layer.out_channels, *affine, shape.eps)
        elif shape.norm == "group":
            z = F.group_norm(z, shape.groups, *affine, shape.eps)
        elif shape.norm == "layer":
            z = F.layer_norm(z, z.shape[1:], *affine, shape.eps)
        elif shape.norm == "batch":
            seen = z.detach()
            statistics.batch.append(torch.stack([seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)]))
            z = F.batch_norm(z, None, None, *affine, training=True, eps=shape.eps)
        elif shape.norm == "running":
            z = F.batch_norm(z, *statistics.of_block(shape, i), *affine, eps=shape.eps)
        leaky = shape.activation == "leaky_relu"
        found.append(F.leaky_relu(z, shape.slope) if leaky else _ACTIVATIONS[shape.activation](z))
        x = found[-1] if shape.pool == "none" else _POOLS[shape.pool](found[-1], 2)
    return found, x.flatten(1)


def _net(shape: ConvNetShape, parameters: list[Tensor], x: Tensor, statistics: Statistics) -> Tensor:
    return F.linear(_activations(shape, parameters, x, statistics)[1], *parameters[-2:])


def _loss(shape: ConvNetShape, theta: Tensor, x: Tensor, y: Tensor, label_kind: str, statistics: Statistics) -> Tensor:
    parameters = [p[0] for p in shape.slices(theta[None])]
    logits = _net(shape, parameters, x, statistics)
    return F.cross_entropy(logits, y.softmax(1) if label_kind == "logits" else y)


def _of_student(tensor: Tensor, e: int, shared_dims: int) -> Tensor:
    return tensor if tensor.dim() == shared_dims else tensor[e]


def convnet_logits(shape: ConvNetShape, theta: Tensor, images: Tensor, running: Tensor | None) -> Tensor:
    found = []
    for e, row in enumerate(theta.detach()):
        parameters = [p[0] for p in shape.slices(row[None])]
        found.append(_net(shape, parameters, _of_student(images, e, 4), Statistics(running, e)))
    return torch.stack(found)


def convnet_features(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    p: float,
    attended: Sequence[int],
    axis: Axis,
    running: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each student: the attention maps of the attended blocks side by side, and the embedding; differentiable."""
    found = []
    for e, row in enumerate(theta):
        parameters = [part[0] for part in shape.slices(row[None])]
        x = _of_student(images, e, 4)
        activations, embedding = _activations(shape, parameters, x, Statistics(running, e))
        maps = [attention_map(activations[block], p, "both") for block in attended]
        none = embedding[:, :0]
        spatial = torch.cat([none, *(m[0] for m in maps if axis != "channel")], 1)
        channel = torch.cat([none, *(m[1] for m in maps if axis != "spatial")], 1)
        found.append((spatial, channel, embedding))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def convnet_gradient(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    label_kind: str,
    running: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    found = []
    with torch.enable_grad():
        for e, row in enumerate(theta):
            t = row.detach().requires_grad_()
            y = _of_student(labels, e, 1 if label_kind == "hard" else 2)
            seen = Statistics(running, e)
            loss = _loss(shape, t, _of_student(images, e, 4), y, label_kind, seen)
            if statistics is not None:
                statistics[e] = torch.cat(seen.batch, 1)
            found.append((loss.detach(), torch.autograd.grad(loss, t)[0]))
    losses, grads = zip(*found, strict=True)
    return torch.stack(losses), torch.stack(grads)


def convnet_tangent(
    shape: ConvNetShape,
    theta: Tensor,
    direction: Tensor,
    images: Tensor,
    labels: Tensor,
    label_kind: str,
    running: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    soft = label_kind != "hard"
    found = []
    with torch.enable_grad():
        for e, row in enumerate(theta):
            t = row.detach().requires_grad_()
            x = _of_student(images, e, 4).detach().requires_grad_()
            y = _of_student(labels, e, 2 if soft else 1).detach().requires_grad_(soft)
            (g,) = torch.autograd.grad(_loss(shape, t, x, y, label_kind, Statistics(running, e)), t, create_graph=True)
            slope = (g * direction[e]).sum()
            inputs = (t, x, y) if soft else (t, x)
            found.append((slope.detach(), *torch.autograd.grad(slope, inputs)))
    slope, curvature, images_grad, *labels_grad = (torch.stack(parts) for parts in zip(*found, strict=True))
    return slope, curvature, images_grad, labels_grad[0] if soft else None
