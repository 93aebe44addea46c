"""The VGG of the cross-architecture tables."""

from __future__ import annotations

from torch import nn

from pydistill.nn.acceleration import Conv2d, accelerate
from pydistill.nn.student import Student, is_large

_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # widths of the convolutions between max pools
_NORMS = ("instance", "batch", "none")


class VGG11(Student):
    """Eight 3x3 convolutions, each with norm and ReLU, five 2x2 max pools, and one linear layer.

    Structure, parameter order and ``state_dict`` keys (``features.<i>``, ``classifier``) are those of VGG11 (norm
    "instance", ``GroupNorm(C, C)``) and VGG11BN ("batch") in VICO-UoE/DatasetCondensation and its descendants; for
    images of 64 pixels or more every second position of the last map is kept, as in their variant for Tiny ImageNet. A
    one-channel input is padded by 3 (28x28 becomes 32x32). Instance norm and ReLU run as one fused operator.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        norm: "instance", "batch" or "none".

    Raises:
        ValueError: an unknown norm, or images too small; a forward input of another shape.
    """

    features: nn.Sequential

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int] = 32, norm: str = "instance"):
        super().__init__(channels, num_classes, image_size)
        self._require("norm", norm, _NORMS)
        size: tuple[int, ...] = self.image_size
        before = channels
        layers: list[nn.Module] = []
        for widths in _VGG11:
            for width in widths:
                padding = 3 if channels == 1 and not layers else 1
                size = tuple(s + 2 * padding - 2 for s in size)
                layers.append(Conv2d(before, width, 3, padding=padding))
                if norm != "none":
                    layers.append(nn.GroupNorm(width, width) if norm == "instance" else nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                before = width
            layers.append(nn.MaxPool2d(2))
            size = tuple(s // 2 for s in size)
        self._require_room(size)
        if is_large(self.image_size):
            layers.append(nn.AvgPool2d(1, stride=2))
            size = tuple((s + 1) // 2 for s in size)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * size[0] * size[1], num_classes)
        if norm == "instance":
            accelerate(self)
