"""Siamese augmentation in plain torch: six operators one after the other, with parameters given as a record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("forward", "forward+backward")

AugmentOp = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Augmentation:
    mode: str
    images: Tensor  # [B, C, H, W]
    record: Tensor  # [B, 13], float32: the columns of pydistill.ops.augment_images, every operation active
    grad: Tensor  # of the result

    def double(self) -> Augmentation:
        return replace(self, images=self.images.double(), grad=self.grad.double())


def make_augmentation(shape: tuple[int, ...], mode: str, dtype: torch.dtype = torch.float32) -> Augmentation:
    """Parameters from the distributions of the method repositories."""
    generator = torch.Generator().manual_seed(0)
    B, _, H, W = shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    def integer(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (B,), generator=generator).float()

    columns = [uniform(-0.5, 0.5), uniform(0, 2), uniform(0.5, 1.5)]
    columns += [integer(-round(side / 8), round(side / 8)) for side in (H, W)]
    columns += [integer(0, side) - side // 4 for side in (H, W)]
    columns += [torch.full((B,), float(side // 2)) for side in (H, W)]
    columns += [integer(0, 1), uniform(1 / 1.2, 1.2), uniform(1 / 1.2, 1.2), uniform(-math.pi / 12, math.pi / 12)]
    images, grad = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return Augmentation(mode, images, torch.stack(columns, 1), grad)


def color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    x = x + brightness.view(-1, 1, 1, 1)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * saturation.view(-1, 1, 1, 1) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast.view(-1, 1, 1, 1) + mean


def crop(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    B, _, H, W = x.shape
    batch = torch.arange(B).view(-1, 1, 1)
    i = (torch.arange(H).view(1, -1, 1) + down.long().view(-1, 1, 1) + 1).clamp(0, H + 1)
    j = (torch.arange(W).view(1, 1, -1) + across.long().view(-1, 1, 1) + 1).clamp(0, W + 1)
    return F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()[batch, i, j].permute(0, 3, 1, 2)


def cut_out(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    H, W = x.shape[2:]
    i, j = torch.arange(H).view(1, -1, 1), torch.arange(W).view(1, 1, -1)
    top, left, height, width = (p.long().view(-1, 1, 1) for p in (top, left, height, width))
    inside = (i >= top) & (i < top + height) & (j >= left) & (j < left + width)
    return x * (~inside).to(x.dtype).unsqueeze(1)


def resample(x: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.to(x.dtype), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def scale(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    zero = torch.zeros_like(across)
    return resample(x, torch.stack([across, zero, zero, zero, down, zero], 1).view(-1, 2, 3))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    zero, sine, cosine = torch.zeros_like(angle), angle.sin(), angle.cos()
    return resample(x, torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3))


def scale_by_image(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """With the grids' matrices built as in the method repositories, image by image in Python."""
    theta = [[[across[n], 0, 0], [0, down[n], 0]] for n in range(len(x))]
    return resample(x, torch.tensor(theta, dtype=across.dtype))


def rotate_by_image(x: Tensor, angle: Tensor) -> Tensor:
    theta = [[[a.cos(), (-a).sin(), 0], [a.sin(), a.cos(), 0]] for a in angle]
    return resample(x, torch.tensor(theta, dtype=angle.dtype))


def sequence(images: Tensor, record: Tensor, *, by_image: bool = False) -> Tensor:
    columns = record.to(images.dtype).unbind(1)
    x = cut_out(crop(color(images, *columns[:3]), *columns[3:5]), *columns[5:9])
    x = torch.where(columns[9].view(-1, 1, 1, 1) != 0, x.flip(3), x)
    if by_image:
        return rotate_by_image(scale_by_image(x, *columns[10:12]), columns[12])
    return rotate(scale(x, *columns[10:12]), columns[12])


# The operators by name, as the repositories draw one of them for a batch, with their columns of a record.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], slice]] = {
    "color": (color, slice(0, 3)),
    "crop": (crop, slice(3, 5)),
    "cutout": (cut_out, slice(5, 9)),
    "flip": (lambda x, flip: torch.where(flip.view(-1, 1, 1, 1) != 0, x.flip(3), x), slice(9, 10)),
    "scale": (scale_by_image, slice(10, 12)),
    "rotate": (rotate_by_image, slice(12, 13)),
}
IDENTITY = torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0])


def draw_single(shape: tuple[int, ...], step: int) -> tuple[str, Tensor]:
    """A batch's operation, each in turn, and the record in which only this one is active."""
    name = list(OPERATIONS)[step % len(OPERATIONS)]
    columns = OPERATIONS[name][1]
    record = IDENTITY.expand(shape[0], -1).clone()
    record[:, columns] = make_augmentation(shape, MODES[0]).record[:, columns]
    return name, record


def single(x: Tensor, name: str, record: Tensor) -> Tensor:
    operator, columns = OPERATIONS[name]
    return operator(x, *record[:, columns].to(x.dtype).unbind(1))


def drawn(x: Tensor) -> Tensor:
    """One operation for the whole batch, drawn like its parameters from torch's generator: DiffAugment as in MTT."""
    return single(x, *draw_single(tuple(x.shape), int(torch.randint(len(OPERATIONS), ()))))


def eager_augment(problem: Augmentation, op: AugmentOp = sequence) -> Callable[[], tuple[Tensor, ...]]:
    """`op` under autograd: the result and, in the second mode, the images' gradient."""

    def run() -> tuple[Tensor, ...]:
        if problem.mode == MODES[0]:
            with torch.no_grad():
                return (op(problem.images, problem.record),)
        images = problem.images.detach().requires_grad_()
        out = op(images, problem.record)
        return out.detach(), *torch.autograd.grad(out, images, problem.grad)

    return run


def compiled_augment(problem: Augmentation) -> Callable[[], tuple[Tensor, ...]]:
    """Differentiated from outside: with the derivative inside the graph, torch 2.13 writes out of bounds."""
    return eager_augment(problem, torch.compile(sequence, fullgraph=True, dynamic=False))
