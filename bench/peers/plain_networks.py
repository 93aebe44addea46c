"""The other networks of the distillation repos' tables in plain torch, with their structure and parameter order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # widths of the convolutions between max pools


class PlainAlexNet(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 128, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.fc = nn.Linear(192 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(x.view(x.size(0), -1))


class PlainVGG11(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for widths in _VGG11:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.GroupNorm(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.GroupNorm(width, width)
        self.shortcut = nn.Sequential()
        if before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.GroupNorm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class PlainResNet18(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.GroupNorm(64, 64)
        before, stages = 64, []
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages += [_Block(before, width, stride), _Block(width, width, 1)]
            before = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.stages(F.relu(self.bn1(self.conv1(x)))), 4)
        return self.classifier(x.view(x.size(0), -1))


class PlainTiny(nn.Module):
    """Quick to compile, with the same kinds of layers as the others."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, 16, 3, padding=1), nn.GroupNorm(16, 16)
        self.block = _Block(16, 16, 1)
        self.classifier = nn.Linear(16 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block(F.relu(self.norm(self.conv1(x)))), 4)
        return self.classifier(x.view(x.size(0), -1))


NETWORKS: dict[str, type[nn.Module]] = {
    "resnet18": PlainResNet18,
    "vgg11": PlainVGG11,
    "alexnet": PlainAlexNet,
    "tiny": PlainTiny,  # of 8x8 images
}
