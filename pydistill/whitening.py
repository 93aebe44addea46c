"""ZCA whitening of images, used for many distilled sets."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["ZCA"]

_IMAGES_AT_ONCE = 4096  # held in float64


@dataclass(frozen=True, eq=False)
class ZCA:
    """Decorrelates the D = C H W pixels of an image while changing it as little as possible (Bell & Sejnowski, 1997).

    With the mean and the covariance ``U diag(S) U^T`` (with N - 1 degrees of freedom) of the flattened images it was
    fitted on, an image x becomes ``U diag(1 / sqrt(S + eps)) U^T (x - mean)``. Equal to
    ``kornia.enhance.ZCAWhitening(eps=eps, compute_inv=True)`` up to rounding, as eigenvectors are computed in float64.
    MTT (Cazenavette et al., CVPR 2022) and its successors use eps 0.1, and fit pixels in [0, 1] that are not otherwise
    normalised: for a `pydistill.data.Dataset`, ``train_images * std[:, None, None] + mean[:, None, None]``.

    ``ZCA(**zca.tensors())`` equals zca, so that its tensors may be saved with a result. Calls are differentiable.

    Attributes:
        mean: ``[C, H, W]``, float32 or float64, like the images that it takes.
        matrix: ``[D, D]``, symmetric, of the mean's dtype and device.
        inverse_matrix: ``[D, D]``, its inverse.

    Raises:
        ValueError: the tensors do not belong together.
    """

    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor

    def __post_init__(self) -> None:
        if self.mean.dim() != 3 or self.mean.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"mean: expected float32 or float64 [C, H, W], got {_described(self.mean)}")
        size, dtype, device = self.mean.numel(), self.mean.dtype, self.mean.device
        for name, tensor in (("matrix", self.matrix), ("inverse_matrix", self.inverse_matrix)):
            if tensor.shape != (size, size) or tensor.dtype != dtype or tensor.device != device:
                raise ValueError(f"{name}: expected {dtype} [{size}, {size}] on {device}, got {_described(tensor)}")

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor, eps: float = 0.1) -> ZCA:
        """Finds the whitening of ``images``.

        Time grows with D^3, memory with D^2: 3072 pixels take two matrices of 36 MiB in float32.

        Args:
            images: float32 or float64 ``[N, C, H, W]``, N >= 2.
            eps: added to the variances; may be 0 if N > D and none of them is zero.

        Raises:
            TypeError: images are of another dtype, or eps is not a number.
            ValueError: images have another shape, are too few or not finite, eps is negative, or it is zero and the
                covariance is singular.
        """
        if images.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"images: expected float32 or float64, got {images.dtype}")
        if images.dim() != 4 or not images[:1].numel():
            raise ValueError(f"images: expected [N, C, H, W] with at least one pixel, got {list(images.shape)}")
        if len(images) < 2:
            raise ValueError("images: expected at least 2, as one has no covariance, got 1")
        if not isinstance(eps, (int, float)) or isinstance(eps, bool):
            raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
        rows = images.flatten(1)
        mean = rows.mean(0, dtype=torch.float64)
        covariance = mean.new_zeros(len(mean), len(mean))
        for part in rows.split(_IMAGES_AT_ONCE):
            centred = part.double() - mean
            covariance.addmm_(centred.T, centred, alpha=1 / (len(rows) - 1))
        if not covariance.isfinite().all():
            raise ValueError("images: expected finite pixels with finite squares, got others")
        variances, vectors = torch.linalg.eigh(covariance)
        smallest = len(mean) * torch.finfo(torch.float64).eps * variances[-1]  # rounding of zero
        if eps == 0 and not variances[0] > smallest:
            rank = int((variances > smallest).sum())
            raise ValueError(
                f"eps: expected a positive number, as the covariance of these {len(rows)} images is singular (rank "
                f"{rank} of {len(mean)}), got 0"
            )
        scales = (variances.clamp_min(0) + eps).sqrt()
        matrix, inverse = (vectors / scales) @ vectors.T, (vectors * scales) @ vectors.T
        return cls(mean.view(images.shape[1:]).to(images.dtype), matrix.to(images.dtype), inverse.to(images.dtype))

    def __call__(self, images: Tensor) -> Tensor:
        """Whitens ``images`` ``[..., C, H, W]``, of the mean's dtype and device.

        Raises:
            ValueError: images have another shape or dtype.
        """
        self._check(images)
        return ((images - self.mean).flatten(-3) @ self.matrix).view(images.shape)

    def inverse(self, images: Tensor) -> Tensor:
        """The images ``[..., C, H, W]`` whose whitening gives ``images``: what to show of a distilled set.

        Raises:
            ValueError: images have another shape or dtype.
        """
        self._check(images)
        return (images.flatten(-3) @ self.inverse_matrix).view(images.shape) + self.mean

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, target: torch.device | str | torch.dtype) -> ZCA:
        """The same whitening on another device, or for images of another dtype."""
        return ZCA(**{name: tensor.to(target) for name, tensor in self.tensors().items()})

    def _check(self, images: Tensor) -> None:
        if images.shape[-3:] != self.mean.shape or images.dtype != self.mean.dtype:
            C, H, W = self.mean.shape
            raise ValueError(
                f"images: expected {self.mean.dtype} [..., {C}, {H}, {W}] as it was fitted on, got {_described(images)}"
            )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
