"""A vision transformer, small enough for the data sets here, that exposes its queries and keys."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pydistill.nn.student import Student


class Block(nn.Module):
    """Pre-norm: ``x + proj(attention(norm1(x)))``, then ``x + mlp(norm2(x))``, on tokens ``[B, N, width]``."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, heads, N, width / heads]``."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        # written out: torch's fused attention has no second derivative, which an unrolled student needs
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # [B, heads, N, N]
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(Student):
    """Patches, learnt positions, pre-norm blocks, and a linear classifier on the average token.

    The structure of Dosovitskiy et al. (ICLR 2021), without a class token and at any size. ``last_heads`` gives the
    last block another number of heads, as UNIP does to match its teacher's.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        width: features of a token.
        depth: blocks.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        heads: of each block.
        patch_size: height and width of a patch in pixels.
        last_heads: of the last block; ``heads`` by default.

    Raises:
        ValueError: a size below 1, patches that do not tile the image, heads that do not divide the width; a forward
            input of another shape.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int = 64,
        depth: int = 4,
        image_size: int | tuple[int, int] = 32,
        heads: int = 4,
        patch_size: int = 4,
        last_heads: int | None = None,
    ):
        super().__init__(channels, num_classes, image_size)
        last_heads = heads if last_heads is None else last_heads
        named = {"width": width, "depth": depth, "heads": heads, "patch_size": patch_size, "last_heads": last_heads}
        for name, value in named.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if "heads" in name and width % value:
                raise ValueError(f"{name}: expected a divisor of width {width}, got {value}")
        if any(side % patch_size for side in self.image_size):
            raise ValueError(f"patch_size: expected a divisor of image_size {self.image_size}, got {patch_size}")
        tokens = self.image_size[0] // patch_size * (self.image_size[1] // patch_size)
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        counts = [heads] * (depth - 1) + [last_heads]
        self.blocks = nn.ModuleList(Block(width, count, 4 * width) for count in counts)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images to the average token, ``[B, width]``."""
        x = self._tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)

    def attention(self, x: Tensor, layer: int = -1) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, heads, N, width / heads]`` of block ``layer`` for images ``[B, channels, H, W]``.

        The block's map is ``softmax(q @ k.mT / sqrt(d), -1)``; blocks after it do not run.

        Raises:
            ValueError: there is no such block.
        """
        if not -len(self.blocks) <= layer < len(self.blocks):
            raise ValueError(f"layer: expected one of {len(self.blocks)} blocks, got {layer}")
        x = self._tokens(x)
        index = layer % len(self.blocks)
        for block in self.blocks[:index]:
            x = block(x)
        q, k, _ = cast(Block, self.blocks[index]).heads_of(x)
        return q, k

    def _tokens(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).mT + self.positions
