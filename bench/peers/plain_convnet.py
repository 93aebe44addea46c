"""The distillation repos' ConvNet in plain torch: their structure, parameter order and state_dict keys."""

from __future__ import annotations

from torch import Tensor, nn

_NORMS = {
    "instance": lambda width: nn.GroupNorm(width, width),  # what the repositories call instance norm
    "group": lambda width: nn.GroupNorm(4, width),
    "batch": nn.BatchNorm2d,
}
_ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "leakyrelu": lambda: nn.LeakyReLU(0.01)}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


class PlainConvNet(nn.Module):
    """[convolution 3x3, norm, activation, 2x2 pool] x depth, then a linear classifier.

    With ``doubling``, widths are those of FRePo: width, twice that, and so on.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int = 128,
        depth: int = 3,
        image_size: int = 32,
        *,
        norm: str = "instance",
        act: str = "relu",
        pool: str = "avg",
        doubling: bool = False,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        size, before = image_size, channels
        for block in range(depth):
            # one-channel digits are 28 pixels wide: padding 3 makes them 32 wide after the first convolution
            padding = 3 if channels == 1 and block == 0 else 1
            size = (size + 2 * padding - 2) // 2
            own = width << block if doubling else width
            blocks += [nn.Conv2d(before, own, kernel_size=3, padding=padding), _NORMS[norm](own)]
            blocks += [_ACTIVATIONS[act](), _POOLS[pool](kernel_size=2, stride=2)]
            before = own
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
