"""A convolutional encoder trained without labels, by Barlow Twins: the target of KRR-ST, and HeLlO's encoder here.

    loss = sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2

with C the correlation, over a batch, of the projected features of two augmentations of the same images ("Barlow Twins:
Self-Supervised Learning via Redundancy Reduction", Zbontar et al., ICML 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import DiffAugment
from pydistill.methods.method import OptionError
from pydistill.methods.training import train
from pydistill.nn.student import Student
from pydistill.seeding import Stream, seeded_generator, torch_seeded

__all__ = ["Encoder", "barlow_twins", "barlow_twins_loss", "check_batch"]


class Encoder(Student):
    """``depth`` blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 average pool, each twice as wide; a linear head.

    The network of KRR-ST and FRePo (width 128, depth 3). A one-channel input is padded by 3 in the first convolution.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        outputs: of the linear head.
        width: channels of the first block.
        depth: number of blocks.
        image_size: height and width of the images in pixels.

    Raises:
        ValueError: images too small for the depth; a forward input of another shape.
    """

    features: nn.Sequential

    def __init__(self, channels: int, outputs: int, width: int = 32, depth: int = 3, image_size: int = 32):
        super().__init__(channels, outputs, image_size)
        layers: list[nn.Module] = []
        before, size = channels, image_size
        for block in range(depth):
            padding = 3 if channels == 1 and block == 0 else 1
            after = width * 2**block
            layers += [nn.Conv2d(before, after, 3, padding=padding), nn.BatchNorm2d(after), nn.ReLU(), nn.AvgPool2d(2)]
            before, size = after, (size + 2 * padding - 2) // 2
        self._require_room((size, size))
        self.features = nn.Sequential(*layers)
        self.channels_out = before
        self.classifier = nn.Linear(before * size * size, outputs)

    def pooled(self, x: Tensor) -> Tensor:
        """Images to the last block's mean over positions, ``[N, width * 2 ** (depth - 1)]``."""
        return self.features(x).mean((2, 3))


BATCH = 256  # images per step of `barlow_twins`, and the fewest that it accepts


def barlow_twins_loss(a: Tensor, b: Tensor, weight: float = 5e-3) -> Tensor:
    """The loss of two views' projections ``[B, q]``."""
    a, b = ((z - z.mean(0)) / (z.std(0, correction=0) + 1e-6) for z in (a, b))
    correlation = a.T @ b / len(a)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + weight * (correlation.square().sum() - diagonal.square().sum())


def check_batch(images: Tensor) -> None:
    """ValueError if a run has too few training images for `barlow_twins`."""
    if (count := len(images)) < BATCH:
        raise OptionError("dataset", f"expected at least {BATCH} training images, a batch, got {count}")


def barlow_twins(
    encoder: Encoder,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = BATCH,
    lr: float = 1e-3,
    projection: int = 128,
    augment: DiffAugment | None = None,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> list[float]:
    """Trains ``encoder.features`` in place on unlabelled ``images`` ``[N, C, H, W]`` by Adam under half a cosine.

    The projector, two linear layers, is discarded. An epoch drops the last, incomplete batch.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: fewer images than a batch.
        FloatingPointError: the loss is not finite.
    """
    if len(images) < batch_size:
        raise ValueError(f"images: expected {batch_size}, a batch, or more, got {len(images)}")
    augment = augment or DiffAugment("color_crop_cutout_scale_rotate", mode="all", ratio_cutout=0.25)
    generator = seeded_generator(seed, Stream.SELF_SUPERVISED)
    with torch_seeded(generator):
        projector = nn.Sequential(
            nn.Linear(encoder.channels_out, projection),
            nn.BatchNorm1d(projection),
            nn.ReLU(),
            nn.Linear(projection, projection),
        ).to(images.device)
    parameters = [*encoder.features.parameters(), *projector.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    steps = len(images) // batch_size

    def loss(index: Tensor) -> Tensor:
        x = images[index]
        views = [projector(encoder.pooled(augment(x, augment.draw(x.shape, generator)))) for _ in "ab"]
        return barlow_twins_loss(*views)

    def batches(epoch: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        order = to_device(torch.randperm(len(images), generator=generator, device="cpu"), images.device)
        for index in order[: steps * batch_size].split(batch_size):
            yield 1, partial(loss, index)

    encoder.train()
    losses = train(encoder, optimizer, batches, epochs=epochs, steps=steps, on_step=on_step)
    encoder.eval()
    return losses
