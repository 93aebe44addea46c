"""What the student networks have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pydistill._arguments import check_choice, check_whole


class Student(nn.Module):
    """A network with ``features`` and a linear ``classifier``: images ``[N, channels, H, W]`` to logits.

    Subclasses fill both. ``features`` is a module or a method.

    Raises:
        ValueError: a size below 1; a forward input of another shape than ``channels`` and ``image_size`` say.
    """

    features: Callable[[Tensor], Tensor]
    classifier: nn.Linear
    image_size: tuple[int, int]

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        super().__init__()
        self.channels = channels
        self.image_size = sides(image_size)
        check_whole("channels", channels, 1)
        check_whole("num_classes", num_classes, 1)
        check_whole("image_size", min(self.image_size), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, channels, H, W]`` to logits ``[N, num_classes]``."""
        return self.classifier(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Images to the flattened features before the classifier, ``[N, F]``."""
        if x.dim() != 4 or x.shape[1] != self.channels or tuple(x.shape[2:]) != self.image_size:
            H, W = self.image_size
            raise ValueError(f"images: expected [N, {self.channels}, {H}, {W}], got {list(x.shape)}")
        return torch.flatten(self.features(x), 1)

    def _require(self, name: str, value: str, known: tuple[str, ...]) -> None:
        check_choice(name, value, known)

    def _require_room(self, size: tuple[int, ...], least: int = 1) -> None:
        if min(size) < least:
            raise ValueError(f"image_size: too small for {type(self).__name__}, got {self.image_size}")


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; TypeError for anything but a whole number or two."""
    both = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(both) != 2 or not all(isinstance(side, int) for side in both):
        raise TypeError(f"image_size: expected a whole number of pixels or (height, width), got {image_size!r}")
    return both[0], both[1]


def is_large(size: tuple[int, int]) -> bool:
    """Whether to use the repositories' variants for Tiny ImageNet, which halve the image once more."""
    return min(size) >= 64
