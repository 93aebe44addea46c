"""ResNet-18 in torchvision's layout, for 224x224 images, as run by a recover step: frozen, for its gradient to the
images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class ResNet18(nn.Module):
    """Parameters and keys as in torchvision's; ``width`` of the first stage is 64 there."""

    def __init__(self, classes: int = 1000, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = width
        for i in range(4):
            after = width * 2**i
            blocks = BasicBlock(before, after, 1 if i == 0 else 2), BasicBlock(after, after, 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            before = after
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def frozen(classes: int = 1000, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> ResNet18:
    """A network in eval mode whose running statistics are those of noise, so that activations keep their scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ResNet18(classes, width).to(dtype)
        with torch.no_grad():
            for _ in range(20):
                net(torch.randn(8, 3, 64, 64, dtype=dtype))
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Layer:
    """A convolution of the network with constant weights, and a cotangent; wanted: (y, gradient of x)."""

    x: Tensor
    weight: Tensor  # 3x3, or the stem's 7x7; padded to keep the size
    grad: Tensor
    stride: int

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.weight.shape[2] // 2}

    def to(self, *arguments: Any, **options: Any) -> Layer:
        return Layer(*(t.to(*arguments, **options) for t in (self.x, self.weight, self.grad)), self.stride)


def make_layer(
    batch: int, before: int, width: int, size: int, taps: int, stride: int, dtype: torch.dtype = torch.float32
) -> Layer:
    generator = torch.Generator().manual_seed(0)
    after = -(-size // stride)
    shapes = (batch, before, size, size), (width, before, taps, taps), (batch, width, after, after)
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return Layer(x, weight / (taps * before**0.5), grad, stride)


Thunk = Callable[[], tuple[Tensor, ...]]


def differentiated(convolve: Callable[[Tensor], Tensor], layer: Layer) -> Thunk:
    x = layer.x.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = convolve(x)
        return y.detach(), torch.autograd.grad(y, x, layer.grad)[0]

    return run


def layer_in_torch(layer: Layer, channels_last: bool = False, compiled: bool = False) -> Thunk:
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, **layer.geometry)

    return differentiated(torch.compile(convolve, dynamic=False) if compiled else convolve, layer)


@dataclass(frozen=True)
class Recovered:
    """Images and labels of a frozen network; wanted: (logits, gradient of the cross-entropy to images)."""

    net: nn.Module
    images: Tensor
    labels: Tensor


def make_recovered(batch: int, size: int, width: int, classes: int, dtype: torch.dtype = torch.float32) -> Recovered:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator, dtype=dtype)
    return Recovered(frozen(classes, width, dtype=dtype), images, torch.arange(batch) % classes)


def network_in_torch(problem: Recovered, channels_last: bool = False, compiled: bool = False) -> Thunk:
    net = copy.deepcopy(problem.net)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    return recovered(torch.compile(net, dynamic=False) if compiled else net, problem, channels_last)


def recovered(net: nn.Module, problem: Recovered, channels_last: bool) -> Thunk:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = problem.images.detach().to(memory_format=layout).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        logits = net(images)
        loss = F.cross_entropy(logits, problem.labels)
        return logits.detach(), torch.autograd.grad(loss, images)[0]

    return run
