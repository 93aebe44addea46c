"""Definition of the siamese augmentation: six operators one after the other, with parameters given as a record."""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment_images(images: Tensor, record: Tensor, flip_batch: bool = False, align_corners: bool = True) -> Tensor:
    """`color`, `crop`, `cutout`, `flip`, `scale` and `rotate` of ``[B, C, H, W]`` images in this order.

    With ``flip_batch``, of ``cat([images, images.flip(3)])``. float32 arithmetic for bfloat16 and float16.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    if flip_batch:
        x = torch.cat([x, x.flip(3)])
    brightness, saturation, contrast, crop_y, crop_x, *cutout, flipped, scale_x, scale_y, angle = record.to(
        dtype
    ).unbind(1)
    x = color(x, brightness, saturation, contrast)
    x = crop(x, crop_y, crop_x)
    x = cut_out(x, *cutout)
    x = flip(x, flipped)
    x = scale(x, scale_x, scale_y, align_corners)
    x = rotate(x, angle, align_corners)
    return x.to(images.dtype)


def color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness, then saturation about each pixel's mean, then contrast about each image's mean."""
    brightness, saturation, contrast = (p.view(-1, 1, 1, 1) for p in (brightness, saturation, contrast))
    x = x + brightness
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * saturation + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def crop(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``y[i, j] = x[i + rows, j + columns]``, zero outside the image."""
    B, _, H, W = x.shape
    i = torch.arange(H, device=x.device) + rows.long().view(-1, 1)  # [B, H]
    j = torch.arange(W, device=x.device) + columns.long().view(-1, 1)  # [B, W]
    padded = F.pad(x, (1, 1, 1, 1))
    i, j = (i + 1).clamp(0, H + 1), (j + 1).clamp(0, W + 1)
    batch = torch.arange(B, device=x.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2)


def cut_out(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Zeroes a rectangle."""
    H, W = x.shape[2:]
    i, j = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    top, left, height, width = (p.long().view(-1, 1) for p in (top, left, height, width))
    rows = (i >= top) & (i < top + height)  # [B, H]
    columns = (j >= left) & (j < left + width)  # [B, W]
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def flip(x: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(flipped.view(-1, 1, 1, 1) != 0, x.flip(3), x)


def scale(x: Tensor, across: Tensor, down: Tensor, align_corners: bool = True) -> Tensor:
    """Bilinear; below 1 enlarges."""
    zero = torch.zeros_like(across)
    return resample(x, (across, zero), (zero, down), align_corners)


def rotate(x: Tensor, angle: Tensor, align_corners: bool = True) -> Tensor:
    """Bilinear; a positive angle turns anticlockwise."""
    sine, cosine = angle.sin(), angle.cos()
    return resample(x, (cosine, -sine), (sine, cosine), align_corners)


def resample(x: Tensor, to_x: tuple[Tensor, Tensor], to_y: tuple[Tensor, Tensor], align_corners: bool) -> Tensor:
    """``F.grid_sample(x, F.affine_grid(theta, x.shape))`` by its four taps: torch's has no forward derivative.

    ``theta``'s rows are ``to_x`` and ``to_y``, with nothing added.
    """
    B, C, H, W = x.shape

    def axis(size: int) -> Tensor:  # pixels' centres, with -1 and 1 the centres of the outer pixels, or their edges
        twice = 2 * torch.arange(size, device=x.device, dtype=x.dtype) + 1 - size
        return twice / (max(size - 1, 1) if align_corners else size)

    def place(row: tuple[Tensor, Tensor], size: int) -> Tensor:  # [B, H, W], in pixels
        at = row[0].view(-1, 1, 1) * axis(W) + row[1].view(-1, 1, 1) * axis(H).view(-1, 1)
        return (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2

    j, i = place(to_x, W), place(to_y, H)
    out = torch.zeros_like(x)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = j.floor() + right, i.floor() + below
        weight = (1 - (j - column).abs()) * (1 - (i - row).abs())
        inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
        index = torch.where(inside, row * W + column, 0).long().view(B, 1, H * W).expand(B, C, H * W)
        tap = x.flatten(2).gather(2, index).view_as(x) * weight[:, None]
        out = out + torch.where(inside[:, None], tap, 0)
    return out
