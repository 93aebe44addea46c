"""The multilayer perceptron of the cross-architecture tables."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.nn.student import Student


class MLP(Student):
    """Three linear layers with ReLU between them on the flattened image.

    Structure, parameter order and ``state_dict`` keys (``fc_1``, ``fc_2``, ``fc_3``) are those of MLP in
    VICO-UoE/DatasetCondensation and its descendants, where it is for 1x28x28 and 3x32x32 images; here for any.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        width: units of both hidden layers.
        image_size: height and width of the images in pixels, one int for both or (H, W).

    Raises:
        ValueError: a size below 1; a forward input of another shape.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 128, image_size: int | tuple[int, int] = 32):
        super().__init__(channels, num_classes, image_size)
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        H, W = self.image_size
        self.fc_1 = nn.Linear(channels * H * W, width)
        self.fc_2 = nn.Linear(width, width)
        self.fc_3 = nn.Linear(width, num_classes)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # an attribute elsewhere
        return self.fc_3

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.fc_2(F.relu(self.fc_1(x.flatten(1)))))
