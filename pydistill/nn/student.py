"""What the student networks have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


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
        both = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_size = cast(tuple[int, int], both)
        for name, value in (("channels", channels), ("num_classes", num_classes), ("image_size", min(self.image_size))):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

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
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

    def _require_room(self, size: tuple[int, ...], least: int = 1) -> None:
        if min(size) < least:
            raise ValueError(f"image_size: too small for {type(self).__name__}, got {self.image_size}")


def is_large(size: tuple[int, int]) -> bool:
    """Whether to use the repositories' variants for Tiny ImageNet, which halve the image once more."""
    return min(size) >= 64
