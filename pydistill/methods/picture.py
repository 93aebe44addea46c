"""The picture of its images that a run leaves."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch

from pydistill.data import DistilledSet, write_atomic

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

__all__ = ["picture", "write_picture"]


def write_picture(run: Run, distilled: DistilledSet, per_class: int) -> None:
    """images.png in a run's folder; if Pillow is not installed, the run says so and has none."""
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        run.tell("images.png: none without Pillow: pip install pillow")
    else:
        write_atomic(run.folder / "images.png", picture(distilled, per_class))


def picture(distilled: DistilledSet, per_class: int) -> bytes:
    """A PNG of the distilled images, enlarged to about 64 pixels, a column for each class."""
    from PIL import Image

    images = distilled.pixels()
    scale, gap = max(1, 64 // images.shape[2]), 2
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=1.0)  # [K * ipc, 3, h, w]
    count, channels, height, width = images.shape
    grid = images.view(count // per_class, per_class, channels, height, width).permute(1, 3, 0, 4, 2)
    pixels = (grid.reshape(per_class * height, count // per_class * width, channels) * 255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
