"""A labelled image set in memory, in the form that every distillation method takes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydistill.data.streamed import StreamedImages
from pydistill.whitening import ZCA

__all__ = ["Dataset", "StreamedDataset", "normalised_dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image set in memory, normalised per channel with the mean and deviation of its training images.

    Attributes:
        name: of the set, one of `DATASETS` if it comes from `load`.
        train_images: float32 ``[N, C, H, W]``, ``(pixel - mean) / std`` with pixels in ``[0, 1]``.
        train_labels: int64 ``[N]`` in ``[0, K)``.
        test_images: float32 ``[M, C, H, W]``, normalised with the *training* mean and deviation.
        test_labels: int64 ``[M]``.
        class_names: ``K`` names, in label order.
        mean: float32 ``[C]``, of the training pixels in ``[0, 1]``.
        std: float32 ``[C]``.
        zca: the whitening of the images' pixels, after which mean is zero and std one; or None.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    zca: ZCA | None = None

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of an image in pixels; the sets read here are square."""
        return self.train_images.shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with its images and labels on ``device``."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def marks(self) -> dict[str, Any]:
        """What tells this set from others, as JSON values: of either part the number of images, a checksum of the
        labels, and the mean of 16 images, which a change of the arithmetic's order may round otherwise."""
        found = {}
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            some = torch.linspace(0, len(labels) - 1, 16, device="cpu").long()
            means = images[some.to(labels.device)].mean((1, 2, 3), dtype=torch.float64).tolist()
            found[part] = {
                "images": len(labels),
                "labels_crc32": zlib.crc32(labels.cpu().contiguous().numpy().data),
                "means": [round(mean, 4) for mean in means],
            }
        return found

    def pixels(self, images: Tensor) -> Tensor:
        """Images in the set's space as pixels, ``[..., C, H, W]``."""
        if self.zca is not None:
            return self.zca.to(images.device).inverse(images)
        return images * self.std.to(images)[:, None, None] + self.mean.to(images)[:, None, None]

    def whitened(self, eps: float = 0.1) -> Dataset:
        """The same set whitened by a `pydistill.whitening.ZCA` fitted on the pixels of its training images.

        Raises:
            ValueError: the set is already whitened, or as for `ZCA.fit`.
        """
        if self.zca is not None:
            raise ValueError(f"{self.name}: expected a set that is not whitened yet")
        train = self.pixels(self.train_images)
        zca = ZCA.fit(train, eps)
        return replace(
            self,
            train_images=zca(train),
            test_images=zca(self.pixels(self.test_images)),
            mean=torch.zeros_like(self.mean),
            std=torch.ones_like(self.std),
            zca=zca.to("cpu"),
        )

    def sample(
        self, ipc: int, generator: torch.Generator | None = None, preferred: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws ``ipc`` real training images of each class without replacement.

        Args:
            ipc: images per class, at least 1.
            generator: a CPU generator; the global one by default.
            preferred: bool ``[N]``, training images that are taken before any others of their class.

        Returns:
            Images ``[K * ipc, C, H, W]`` (a copy), classes in order, and their labels ``[K * ipc]``.

        Raises:
            ValueError: ``ipc`` is below 1, or a class has fewer training images than ``ipc``.
        """
        if ipc < 1:
            raise ValueError(f"ipc: expected at least 1 image per class, got {ipc}")
        chosen = []
        for label, name in enumerate(self.class_names):
            members = (self.train_labels == label).nonzero()[:, 0]
            if len(members) < ipc:
                raise ValueError(f"ipc: expected at most {len(members)}, the training images of {name!r}, got {ipc}")
            order = members[torch.randperm(len(members), generator=generator, device="cpu").to(members.device)]
            if preferred is not None:
                order = torch.cat([order[preferred[order]], order[~preferred[order]]])
            chosen.append(order[:ipc])
        index = torch.cat(chosen)
        return self.train_images[index], self.train_labels[index]  # copies


@dataclass(frozen=True, eq=False)
class StreamedDataset(Dataset):
    """A data set whose images are read on demand; what takes samples, batches or a pass takes it as any other.

    Attributes:
        train_images, test_images: indexed like the tensors of a `Dataset`.
    """

    train_images: StreamedImages  # type: ignore[assignment]
    test_images: StreamedImages  # type: ignore[assignment]

    def whitened(self, eps: float = 0.1) -> Dataset:
        raise ValueError(f"{self.name}: expected a set in memory to whiten, got one that is streamed")


def normalised_dataset(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
) -> Dataset:
    """Builds the data set from float32 pixels in [0, 1], [N, C, H, W], and int64 labels."""
    pixels = train[0]
    mean = pixels.mean(dim=(0, 2, 3), dtype=torch.float64)
    # Two passes over one channel at a time: the variance needs no second copy of the set.
    std = torch.stack([pixels[:, c].double().sub_(mean[c]).square_().mean().sqrt() for c in range(pixels.shape[1])])
    mean, std = mean.float(), std.clamp_min(1e-6).float()
    for images in (train[0], test[0]):
        images.sub_(mean[:, None, None]).div_(std[:, None, None])
    return Dataset(name, train[0], train[1], test[0], test[1], tuple(class_names), mean, std)
