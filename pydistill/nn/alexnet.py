"""The AlexNet of the cross-architecture tables."""

from __future__ import annotations

from torch import nn

from pydistill.nn.acceleration import Conv2d, accelerate
from pydistill.nn.student import Student, is_large

# channels, kernel size and whether a 2x2 max pool follows, of each convolution
_LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))
_NORMS = ("none", "instance", "batch")


class AlexNet(Student):
    """Five convolutions with ReLU, three 2x2 max pools, and one linear layer.

    Structure, parameter order and ``state_dict`` keys (``features.<i>``, ``fc``) are those of AlexNet in
    VICO-UoE/DatasetCondensation and its descendants, which has no norm; images of 64 pixels or more are halved by the
    first convolution, as in the variant for Tiny ImageNet. A one-channel input is padded by 4 (28x28 becomes 32x32).

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        norm: "none" as in theirs; "instance" (``GroupNorm(C, C)``) or "batch" after every convolution.

    Raises:
        ValueError: an unknown norm, or images too small; a forward input of another shape.
    """

    features: nn.Sequential

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int] = 32, norm: str = "none"):
        super().__init__(channels, num_classes, image_size)
        self._require("norm", norm, _NORMS)
        size: tuple[int, ...] = self.image_size
        before = channels
        layers: list[nn.Module] = []
        for i, (width, kernel, pool) in enumerate(_LAYERS):
            stride = 2 if i == 0 and is_large(self.image_size) else 1
            padding = kernel // 2 + (2 if i == 0 and channels == 1 else 0)
            size = tuple((s + 2 * padding - kernel) // stride + 1 for s in size)
            layers.append(Conv2d(before, width, kernel, stride, padding))
            if norm != "none":
                layers.append(nn.GroupNorm(width, width) if norm == "instance" else nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            if pool:
                layers.append(nn.MaxPool2d(2))
                size = tuple(s // 2 for s in size)
            before = width
        self._require_room(size)
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(before * size[0] * size[1], num_classes)
        if norm == "instance":
            accelerate(self)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # an attribute elsewhere
        return self.fc
