"""Random resized crops in plain torch: torchvision's operators image by image, and as two products with matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("forward", "forward+backward")
CROPS = ("each", "shared")  # one crop per image, as in relabelling; one for the batch, as in SRe2L's recovery
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CropOp = Callable[["Crops"], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Crops:
    mode: str
    images: Tensor  # [B, 3, H, W]
    boxes: Tensor  # [B, 7], int64: top, left, height, width, flip, roll_y, roll_x
    size: int
    grad: Tensor  # of the result

    def double(self) -> Crops:
        return replace(self, images=self.images.double(), grad=self.grad.double())


def make_crops(shape: tuple[int, ...], size: int, crops: str, mode: str, dtype: torch.dtype = torch.float32) -> Crops:
    """Boxes of an area of U(0.08, 1) of the image's and an aspect of 3/4 to 4/3, rolled by up to 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    B, _, H, W = shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    area, aspect = H * W * uniform(0.08, 1), ((4 / 3) ** uniform(-1, 1)).sqrt()
    width, height = ((area.sqrt() * f).round().clamp(1, s) for f, s in ((aspect, W), (1 / aspect, H)))
    top, left = (uniform(0, 1) * (H - height + 1)).floor(), (uniform(0, 1) * (W - width + 1)).floor()
    flip, rolls = uniform(0, 2).floor(), [uniform(0, 33).floor() for _ in range(2)]
    boxes = torch.stack([top, left, height, width, flip, *rolls], 1).long()
    if crops == "shared":
        boxes = boxes[:1].expand(B, -1)
    images = torch.randn(shape, generator=generator, dtype=dtype)
    return Crops(mode, images, boxes, size, torch.randn(B, 3, size, size, generator=generator, dtype=dtype))


def resized(x: Tensor, box: list[int], size: int) -> Tensor:
    """torchvision's resized_crop of tensors, hflip, and the repository's jitter."""
    top, left, height, width, flip, *rolls = box
    x = x[..., top : top + height, left : left + width]
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return torch.roll(x.flip(-1) if flip else x, rolls, (-2, -1))


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def by_image(problem: Crops) -> Callable[[Tensor], Tensor]:
    """The whole batch at once if it shares one crop."""
    boxes = problem.boxes.tolist()
    if problem.boxes.stride(0) == 0:
        return lambda images: normalised(resized(images, boxes[0], problem.size))

    def run(images: Tensor) -> Tensor:  # unbind: slices would each have a gradient of the whole batch
        pairs = zip(images.unbind(0), boxes, strict=True)
        return normalised(torch.stack([resized(x[None], box, problem.size)[0] for x, box in pairs]))

    return run


def triangles(begin: Tensor, length: Tensor, flip: Tensor, roll: Tensor, size: int, pixels: int) -> Tensor:
    """``[B, size, pixels]``: the filter of one axis, including the crop, the flip and the roll."""
    begin, length, flip, roll = (v.view(-1, 1, 1) for v in (begin, length, flip, roll))
    place = (torch.arange(size).view(-1, 1) - roll) % size
    place = torch.where(flip != 0, size - 1 - place, place)
    scale = length.double() / size
    x = torch.arange(pixels) - begin
    weights = 1 - (x + 0.5 - scale * (place + 0.5)).abs() / scale.clamp(min=1)
    weights = torch.where((x >= 0) & (x < length), weights.clamp(min=0), 0)
    return weights / weights.sum(2, keepdim=True)


def as_products(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """``rows @ image @ columns^T`` for all images at once."""
    top, left, height, width, flip, roll_y, roll_x = boxes.unbind(1)
    rows = triangles(top, height, torch.zeros_like(flip), roll_y, size, images.shape[2]).to(images.dtype)
    columns = triangles(left, width, flip, roll_x, size, images.shape[3]).to(images.dtype)
    return normalised(rows[:, None] @ images @ columns[:, None].mT)


def products(problem: Crops) -> Callable[[Tensor], Tensor]:
    return lambda images: as_products(images, problem.boxes, problem.size)


def compiled_products(problem: Crops) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(as_products, fullgraph=True, dynamic=False)
    return lambda images: compiled(images, problem.boxes, problem.size)


def crops_of(problem: Crops, op: CropOp = by_image) -> Callable[[], tuple[Tensor, ...]]:
    """`op` under autograd: the result and, in the second mode, the images' gradient."""
    run_op = op(problem)

    def run() -> tuple[Tensor, ...]:
        if problem.mode == MODES[0]:
            with torch.no_grad():
                return (run_op(problem.images),)
        images = problem.images.detach().requires_grad_()
        out = run_op(images)
        return out.detach(), *torch.autograd.grad(out, images, problem.grad)

    return run
