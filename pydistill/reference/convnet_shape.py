"""The shape of a distillation ConvNet and where its parameters are in a flat vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from pydistill._arguments import check_choice

KERNEL = 3  # side of every convolution in pixels

Norm = Literal["instance", "batch", "group", "layer", "none", "running"]  # in the order of ConvNetStep::Norm
Activation = Literal["relu", "leaky_relu", "sigmoid", "tanh", "swish"]
Pool = Literal["avg", "max", "none"]


class Layer(NamedTuple):
    """One block; height and width are those after its convolution, before its pool."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    padding: int


@dataclass(frozen=True)
class ConvNetShape:
    """Blocks of 3x3 convolution, norm, activation and 2x2 pool, then a linear classifier.

    Parameters are in a flat vector in the order of `pydistill.nn.ConvNet`: per block the convolution's weight and bias
    and the norm's weight and bias, then the classifier's weight and bias.

    Norms are ``GroupNorm(C, C)`` ("instance"), ``GroupNorm(groups, C)``, ``LayerNorm([C, H, W])``, ``BatchNorm2d`` with
    the batch's statistics ("batch") or with the kept ones ("running"), or "none"; the others have affine parameters.

    Raises:
        ValueError: a size below 1, images too small for the depth, or an unknown name.
    """

    channels: int
    height: int
    width_px: int  # of the input images [N, channels, height, width_px]
    widths: tuple[int, ...]  # output channels of each block
    first_padding: int  # of the first convolution; the others have 1
    classes: int
    eps: float = 1e-5  # added to the variance
    norm: Norm = "instance"
    groups: int = 1  # of a "group" norm
    activation: Activation = "relu"
    slope: float = 0.01  # of a "leaky_relu" below zero
    pool: Pool = "avg"
    biased: bool = True  # whether convolutions have a bias

    def __post_init__(self) -> None:
        for name, value, known in (
            ("norm", self.norm, Norm),
            ("activation", self.activation, Activation),
            ("pool", self.pool, Pool),
        ):
            check_choice(name, value, get_args(known))
        if not self.widths:
            raise ValueError("widths: expected at least one block, got none")
        sizes = [("channels", self.channels), ("height", self.height), ("width_px", self.width_px)]
        sizes += [("classes", self.classes), *(("widths", width) for width in self.widths)]
        for name, size in sizes:
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.first_padding < 0:
            raise ValueError(f"first_padding: expected at least 0, got {self.first_padding}")
        if self.norm == "group" and (self.groups < 1 or any(width % self.groups for width in self.widths)):
            raise ValueError(f"groups: expected a divisor of every width {self.widths}, got {self.groups}")
        if any(min(layer.height, layer.width) < self.stride for layer in self.layers):
            raise ValueError(f"widths: {len(self.widths)} blocks leave nothing of {self.height}x{self.width_px} images")

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        found: list[Layer] = []
        channels, height, width = self.channels, self.height, self.width_px
        for block, out_channels in enumerate(self.widths):
            padding = 1 if block else self.first_padding
            height, width = (size + 2 * padding - KERNEL + 1 for size in (height, width))
            found.append(Layer(channels, out_channels, height, width, padding))
            channels, height, width = out_channels, height // self.stride, width // self.stride
        return tuple(found)

    @property
    def fused(self) -> bool:
        """Whether a block is that of `pydistill.instance_norm_relu_avg_pool`."""
        return (self.norm, self.activation, self.pool) == ("instance", "relu", "avg")

    @property
    def stride(self) -> int:
        """Side of a pool's window in pixels."""
        return 1 if self.pool == "none" else 2

    @property
    def features(self) -> int:
        """How many features the classifier sees of an image."""
        last = self.layers[-1]
        return last.out_channels * (last.height // self.stride) * (last.width // self.stride)

    @cached_property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes: list[tuple[int, ...]] = []
        for layer in self.layers:
            channels = (layer.out_channels,)
            shapes.append((*channels, layer.in_channels, KERNEL, KERNEL))
            if self.biased:
                shapes.append(channels)
            if self.norm == "layer":
                shapes += [(*channels, layer.height, layer.width)] * 2
            elif self.norm != "none":
                shapes += [channels, channels]
        return (*shapes, (self.classes, self.features), (self.classes,))

    @cached_property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes)

    def slices(self, theta: Tensor) -> list[Tensor]:
        """Views of theta ``[E, P]``, each parameter with E in front; raises ``ValueError`` for another shape."""
        if theta.dim() != 2 or theta.shape[1] != self.numel:
            raise ValueError(f"theta: expected shape [E, {self.numel}] for this net, got {list(theta.shape)}")
        parts = theta.split([math.prod(shape) for shape in self.parameter_shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.parameter_shapes, strict=True)]
