"""Training options that keep an expert's trajectory smooth enough for a student on few images to follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GSAM:
    """Descend towards flat minima: two gradients per step, g at theta and g_p at theta + eps.

    With eps = `pydistill.trajectory.flat.sam_perturbation` of g, the step is along `gsam_combine` of both, ``g_p -
    alpha * (the part of g orthogonal to g_p)``. GSAM (Zhuang et al., ICLR 2022), as FTD (Du et al., CVPR 2023) trains
    experts: there rho 0.01, adaptive, alpha 0.4. The radius is the same in all epochs, as in FTD's runs.

    Attributes:
        rho: radius of the neighbourhood, positive.
        alpha: weight of the orthogonal part, >= 0; 0 is SAM (Foret et al., ICLR 2021).
        adaptive: the neighbourhood of ASAM (Kwon et al., ICML 2021), in which large weights move further.

    Raises:
        TypeError, ValueError: an attribute is not a number, or out of range.
    """

    rho: float
    alpha: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        _check_number("rho", self.rho)
        if self.rho == 0:
            raise ValueError("rho: expected a positive number, got 0, which is training without GSAM")
        _check_number("alpha", self.alpha)


@dataclass(frozen=True)
class Smoothing:
    """What AST (Shen et al., "Efficient Dataset Distillation via Alignment with Smooth Experts", 2023) adds to SGD.

    A step's gradient, which momentum and weight decay then take up, is that of

        ``loss_decay[epoch] * cross_entropy + gradient_penalty * mean((||d sum(z) / dx||_2 - 1)^2)``

    with the logits z of the images x before augmentation, the norm over channels and the mean over images and pixels;
    its norm is at most ``clip_norm``.

    Attributes:
        gradient_penalty: weight of the penalty, AST's 2; 0: none. It needs the generic engine.
        loss_decay: factors on the cross entropy in the first epochs; one in those that follow. AST's:
            0.5, 0.55, ... 0.95.
        clip_norm: (not AST's) largest norm of a student's gradient, as ``torch.nn.utils.clip_grad_norm_``; None: any.

    Raises:
        TypeError, ValueError: an attribute is not a number, or out of range.
    """

    gradient_penalty: float = 0.0
    loss_decay: Sequence[float] = ()
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check_number("gradient_penalty", self.gradient_penalty)
        if not isinstance(self.loss_decay, Sequence) or isinstance(self.loss_decay, str):
            raise TypeError(f"loss_decay: expected a sequence of numbers, got {type(self.loss_decay).__name__}")
        for epoch, factor in enumerate(self.loss_decay):
            _check_number(f"loss_decay[{epoch}]", factor)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm)
            if self.clip_norm == 0:
                raise ValueError("clip_norm: expected a positive number, got 0, at which nothing trains")


def clipped(grad: Tensor, clip_norm: float) -> Tensor:
    """Each student's gradient [E, P] scaled to a norm of at most ``clip_norm``, as torch's ``clip_grad_norm_`` does."""
    norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    return grad * (clip_norm / (norm + 1e-6)).clamp_max(1)


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
