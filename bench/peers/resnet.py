"""ResNet-18 as torchvision lays it out, for 224x224 images, and how a recover step runs it: frozen, for its gradient to
the images."""

from __future__ import annotations

import torch
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
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


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
