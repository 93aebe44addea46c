"""Parts of images: which patches matter (Dataset Quantization), which crops are worth keeping, and mosaics of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._arguments import check_choice

__all__ = ["best_crops", "drop_patches", "mosaic", "patch_importance"]


def patch_importance(
    net: nn.Module, images: Tensor, labels: Tensor, patch_size: int, *, layer: nn.Module | None = None
) -> Tensor:
    """How much each patch of an image supports its label, by Grad-CAM (Selvaraju et al., ICCV 2017).

    With A the output of ``layer`` and z the label's logit: ``relu((dz/dA).mean((2, 3)) . A)`` over the channels,
    enlarged bilinearly to the image and averaged over each patch. Without a layer, A is the image, and its gradient is
    used pointwise: ``|(dz/dA * A).sum(1)|``.

    Args:
        net: images to logits ``[N, K]``; in its current mode.
        images: floating ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        patch_size: side of a patch in pixels; divides H and W.
        layer: a module of ``net`` whose output is ``[N, c, h, w]``, for a ConvNet ``net.features``.

    Returns:
        ``[N, H / patch_size, W / patch_size]``, not negative.

    Raises:
        ValueError: patches that do not fill the image, other labels, or a layer without such an output.
    """
    grid = _grid(images, patch_size)
    _check_labels(images, labels)
    seen: list[Tensor] = []
    if layer is None:
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_own_logits(net, x, labels), x)
        cam = (gradient * images).sum(1).abs()[:, None]
    else:
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            with torch.enable_grad():
                logits = _own_logits(net, images, labels)
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].dim() != 4:
            got = f"{len(seen)} calls" if len(seen) != 1 else f"{list(seen[0].shape)}"
            raise ValueError(f"layer: expected a module that net calls once for an output [N, c, h, w], got {got}")
        (gradient,) = torch.autograd.grad(logits, seen[0])
        cam = (gradient.mean((2, 3), keepdim=True) * seen[0].detach()).sum(1, keepdim=True).relu()
        cam = F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(cam, grid)[:, 0]


def drop_patches(
    images: Tensor, importance: Tensor, keep: float, *, fill: Literal["mean", "bilinear"] = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Keeps the most important patches of each image, and fills in the others from them.

    Dataset Quantization stores only the kept patches and has a masked autoencoder fill in the others. That takes the
    weights of a large network; the fills here need none:

    * "mean": the mean of the kept pixels, per image and channel.
    * "bilinear": each dropped patch has the mean of the kept ones around it, in a neighbourhood enlarged until there
      are any; these means are interpolated bilinearly between the centres of the patches.

    Args:
        images: floating ``[N, C, H, W]``.
        importance: ``[N, h, w]`` with patches of ``H / h`` by ``W / w`` pixels, as `patch_importance` gives it.
        keep: the share of patches to keep, in (0, 1], rounded up; the first of equally important ones.
        fill: see above.

    Returns:
        The images, and bool ``[N, h, w]``: the patches that were kept.

    Raises:
        ValueError: keep, fill or a shape that is not as above, or importance that is not finite.
    """
    if importance.dim() != 3 or len(importance) != len(images) or 0 in importance.shape:
        raise ValueError(f"importance: expected [{len(images)}, h, w], got {list(importance.shape)}")
    N, h, w = importance.shape
    H, W = images.shape[2:]
    if H % h or W % w:
        raise ValueError(f"importance: expected a grid that divides images of {H}x{W}, got {h}x{w}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    check_choice("fill", fill, ("mean", "bilinear"))
    if not importance.isfinite().all():
        raise ValueError("importance: expected finite values, got others")
    count = math.ceil(keep * h * w - 1e-9)
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    kept = (
        torch.zeros(N, h * w, dtype=torch.bool, device=images.device).scatter_(1, order[:, :count], True).view(N, h, w)
    )
    weight = kept[:, None].to(images.dtype)  # [N, 1, h, w]
    means = F.adaptive_avg_pool2d(images, (h, w)) * weight
    if fill == "mean":
        painted = (means.sum((2, 3), keepdim=True) / count).expand_as(images)
    else:
        total, around, radius = means, weight, 0
        filled, known = means, kept[:, None]
        while not known.all():
            radius += 1
            total, around = (F.avg_pool2d(x, 2 * radius + 1, 1, radius, divisor_override=1) for x in (means, weight))
            filled = torch.where(known, filled, total / around.clamp_min(1))
            known = known | (around > 0)
        painted = F.interpolate(filled, size=(H, W), mode="bilinear", align_corners=False)
    mask = kept[:, None].repeat_interleave(H // h, 2).repeat_interleave(W // w, 3)
    return torch.where(mask, images, painted), kept


@torch.no_grad()
def best_crops(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    crops: int = 5,
    least_area: float = 0.5,
    factor: int = 1,
    batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The crop of each image that ``net`` is surest of, as RDED (Sun et al., CVPR 2024) and PCA choose patches.

    A crop is a square of ``U(least_area, 1)`` of the image's area at a uniform place, resized to the image's size
    bilinearly and then averaged down by ``factor``. Its score is the cross-entropy of ``net`` on it, enlarged again.

    Args:
        net: images to logits ``[N, K]``; in its current mode.
        images: floating ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        crops: how many to draw for each image.
        least_area: of a crop, a share in (0, 1]; 1 leaves the images whole.
        factor: divides H and W.
        batch_size: images at a time.
        generator: for the draws, on the CPU; torch's default one when None.

    Returns:
        ``[N, C, H / factor, W / factor]``, and the scores, ``[N]``, smallest where the network is surest.

    Raises:
        ValueError: an argument that is not as above.
    """
    _grid(images, factor, "factor")
    _check_labels(images, labels)
    if crops < 1 or not 0 < least_area <= 1:
        raise ValueError(f"crops, least_area: expected at least 1 and a share in (0, 1], got {crops}, {least_area}")
    kept, scores = [], []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        best = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        chosen = torch.zeros_like(F.avg_pool2d(x, factor))
        for _ in range(crops):
            area, down, across = torch.rand(3, len(x), generator=generator, dtype=torch.float32, device="cpu")
            side = (least_area + (1 - least_area) * area).sqrt()
            theta = torch.zeros(len(x), 2, 3, dtype=torch.float32, device="cpu")
            theta[:, 0, 0] = theta[:, 1, 1] = side
            theta[:, 0, 2], theta[:, 1, 2] = ((1 - side) * (2 * place - 1) for place in (across, down))
            grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
            crop = F.avg_pool2d(F.grid_sample(x, grid, padding_mode="border", align_corners=False), factor)
            shown = crop if factor == 1 else F.interpolate(crop, scale_factor=factor, mode="bilinear")
            score = F.cross_entropy(net(shown), y, reduction="none")
            better = score < best
            best = torch.where(better, score, best)
            chosen[better] = crop[better]
        kept.append(chosen)
        scores.append(best)
    return torch.cat(kept), torch.cat(scores)


def mosaic(patches: Tensor, factor: int) -> Tensor:
    """Combines each ``factor * factor`` patches ``[N, C, h, w]``, row by row, to an image of ``factor`` times the size.

    Raises:
        ValueError: the patches do not fill the images.
    """
    if patches.dim() != 4 or factor < 1 or len(patches) % factor**2:
        wanted = f"[N, C, h, w] with N a multiple of {factor}^2"
        raise ValueError(f"patches: expected {wanted}, got {list(patches.shape)}")
    _, C, h, w = patches.shape
    tiles = patches.view(-1, factor, factor, C, h, w).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(-1, C, factor * h, factor * w)


def _own_logits(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return net(images).gather(1, labels[:, None]).sum()


def _grid(images: Tensor, size: int, name: str = "patch_size") -> tuple[int, int]:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating [N, C, H, W], got {images.dtype} {list(images.shape)}")
    H, W = images.shape[2:]
    if size < 1 or H % size or W % size:
        raise ValueError(f"{name}: expected a divisor of {H} and {W}, got {size}")
    return H // size, W // size


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise ValueError(f"labels: expected int64 [{len(images)}], got {got}")
