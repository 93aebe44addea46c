"""The distillation repos' ConvNet in plain torch: their structure, parameter order and state_dict keys."""

from __future__ import annotations

from torch import Tensor, nn


class PlainConvNet(nn.Module):
    """[convolution 3x3, instance norm, ReLU, 2x2 average pool] x depth, then a linear classifier.

    The norm is a `GroupNorm` with one channel a group: this is what the repos call instance norm.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 128, depth: int = 3, image_size: int = 32) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        size = image_size
        for block in range(depth):
            # one-channel digits are 28 pixels wide: padding 3 makes them 32 wide after the first convolution
            padding = 3 if channels == 1 and block == 0 else 1
            size = (size + 2 * padding - 2) // 2
            blocks += [
                nn.Conv2d(channels if block == 0 else width, width, kernel_size=3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(kernel_size=2, stride=2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
