"""The ResNet-18 of the cross-architecture tables."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.nn.acceleration import Conv2d, InstanceNormReLUAvgPool
from pydistill.nn.student import Student, is_large

_RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))  # width and stride of each stage of two blocks
_NORMS = ("instance", "batch", "none")


class SmallResNet18(Student):
    """ResNet-18 for small images: a 3x3 convolution, four stages of two basic blocks, average pool, linear layer.

    Structure, parameter order and ``state_dict`` keys (``conv1``, ``bn1``, ``layer<i>.<j>.conv1``, ...,
    ``classifier``) are those of ResNet18 (norm "instance", ``GroupNorm(C, C)``) and ResNet18BN ("batch") in
    VICO-UoE/DatasetCondensation and its descendants, and with ``average_pool`` of ResNet18_AP and ResNet18BN_AP; images
    of 64 pixels or more are halved by the first convolution, as in their variant for Tiny ImageNet. Instance norm runs
    as one operator with the ReLU and the average pool that follow it.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        norm: "instance", "batch" or "none".
        average_pool: halve by 2x2 average pools instead of strides, and classify from the last map, not its mean.

    Raises:
        ValueError: an unknown norm, or images too small; a forward input of another shape.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: int | tuple[int, int] = 32,
        norm: str = "instance",
        average_pool: bool = False,
    ):
        super().__init__(channels, num_classes, image_size)
        self._require("norm", norm, _NORMS)
        self.average_pool = average_pool
        stride = 2 if is_large(self.image_size) else 1
        size = tuple((s - 1) // stride + 1 for s in self.image_size)
        self.conv1 = Conv2d(channels, 64, 3, stride, 1, bias=False)
        self.bn1, self.after1 = _norm(64, norm, relu=True)
        before = 64
        for i, (width, stride) in enumerate(_RESNET18):
            blocks = _Block(before, width, stride, norm, average_pool), _Block(width, width, 1, norm, average_pool)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            size = tuple(s // stride if average_pool else (s - 1) // stride + 1 for s in size)
            before = width
        self._require_room(size, 1 if average_pool else 4)
        height, width = size if average_pool else (s // 4 for s in size)
        self.classifier = nn.Linear(before * height * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.after1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x if self.average_pool else F.avg_pool2d(x, 4)


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int, norm: str, average_pool: bool):
        super().__init__()
        pool = average_pool and stride == 2
        stride = 1 if average_pool else stride
        self.conv1 = Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1, self.after1 = _norm(width, norm, relu=True, pool=pool)
        self.conv2 = Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, _ = _norm(width, norm)
        self.shortcut = nn.Sequential()
        if before != width:
            self.shortcut.append(Conv2d(before, width, 1, stride, bias=False))
            if average_pool:
                self.shortcut.append(nn.AvgPool2d(2))
            self.shortcut.append(_norm(width, norm)[0])

    def forward(self, x: Tensor) -> Tensor:
        out = self.after1(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _norm(channels: int, norm: str, relu: bool = False, pool: bool = False) -> tuple[nn.Module, nn.Module]:
    """The norm, and the ReLU and pool that remain to be done after it."""
    if norm == "instance":
        return InstanceNormReLUAvgPool(channels, relu=relu, pool=pool), nn.Identity()
    after = [nn.ReLU()] * relu + [nn.AvgPool2d(2)] * pool
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity(), nn.Sequential(*after)
