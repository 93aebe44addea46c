"""What stands for a tensor of images where these are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["OnDemand"]


class OnDemand:
    """The base of what is used like a tensor ``[N, C, H, W]`` of constants, of which it reads the rows asked for.

    `train_students` takes one for its images and for those that it tests on.
    """

    dtype: torch.dtype
    device: torch.device
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The rows at some places: int64 of any shape, bool ``[N]``, or a slice; a copy."""
        raise NotImplementedError

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, ``size`` at a time."""
        raise NotImplementedError

    def dim(self) -> int:
        return self.ndim

    def detach(self) -> OnDemand:
        return self

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"
