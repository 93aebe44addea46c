"""ResNet-18 and ResNet-50 in torchvision's layout, so that its checkpoints load without needing torchvision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pydistill._arguments import check_choice

_STRIDES = (1, 2, 2, 2)  # of the four stages


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, before: int, width: int, stride: int, downsample: nn.Sequential | None):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, before: int, width: int, stride: int, downsample: nn.Sequential | None):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)  # the stride is here, as in torchvision
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _ResNet(nn.Module):
    if TYPE_CHECKING:  # torch.jit.script would take them for attributes
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
        self,
        block: type[_BasicBlock] | type[_Bottleneck],
        counts: tuple[int, int, int, int],
        num_classes: int,
        channels: int,
        stem: str,
        width: int,
    ):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("channels", channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_choice("stem", stem, ("imagenet", "cifar"))
        small = stem == "cifar"
        self.conv1 = nn.Conv2d(channels, width, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        before = width
        for stage, (count, stride) in enumerate(zip(counts, _STRIDES, strict=True)):
            inner = width << stage
            after = inner * block.expansion
            layers = []
            for i in range(count):
                step = stride if i == 0 else 1
                downsample = None
                if step != 1 or before != after:
                    downsample = nn.Sequential(nn.Conv2d(before, after, 1, step, bias=False), nn.BatchNorm2d(after))
                layers.append(block(before, inner, step, downsample))
                before = after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet18(_ResNet):
    """ResNet-18 with BatchNorm: 11,689,512 parameters for 1000 classes.

    Structure and ``state_dict`` keys (``conv1``, ``bn1``, ``layer<i>.<j>.conv1``, ``layer<i>.0.downsample.0``, ``fc``)
    are torchvision's, whose checkpoints load with ``strict=True``. For the networks of the small-image dataset
    condensation repositories, with instance norm and another classifier, see `SmallResNet18`.

    Args:
        num_classes: logits per image.
        channels: of the input images ``[N, channels, H, W]``, of any height and width.
        stem: "imagenet": a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2; "cifar": a 3x3 convolution of
            stride 1 and no pool, the variant for CIFAR and Tiny ImageNet in SRe2L's and DWA's repositories.
        width: channels of the first stage; 64 is the published network, less makes a narrow one.

    Raises:
        ValueError: a size below 1, or an unknown stem.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        width: int = 64,
    ):
        super().__init__(_BasicBlock, (2, 2, 2, 2), num_classes, channels, stem, width)


class ResNet50(_ResNet):
    """ResNet-50 with BatchNorm, the stride in the 3x3 convolution: 25,557,032 parameters for 1000 classes.

    Structure and ``state_dict`` keys are torchvision's; the arguments and the errors are those of `ResNet18`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        width: int = 64,
    ):
        super().__init__(_Bottleneck, (3, 4, 6, 3), num_classes, channels, stem, width)
