"""Differentiable siamese augmentation, parametrised as in the dataset distillation repositories.

"Dataset Condensation with Differentiable Siamese Augmentation" (Zhao and Bilen, ICML 2021), after "Differentiable
Augmentation for Data-Efficient GAN Training" (Zhao et al., NeurIPS 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pydistill._arguments import check_choice, check_image_shape, meant
from pydistill._devices import to_device
from pydistill.ops.augment import COLUMNS, IDENTITY, augment_images

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")


class _Draws:
    """Independent draws for some images, from a generator in its current state, or reseeded for each draw."""

    def __init__(
        self,
        images: int,
        generator: torch.Generator | None,
        seed: int | None = None,
        colours: torch.dtype = torch.float32,
    ):
        self.images, self.generator, self.seed, self.colours = images, generator, seed, colours
        self.device = "cpu" if generator is None else generator.device

    def _next(self) -> dict[str, Any]:
        if self.seed is not None:
            assert self.generator is not None
            self.generator.manual_seed(self.seed)
            self.seed += 1
        return {"generator": self.generator, "device": self.device}

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.images, dtype=dtype, **self._next()).to(torch.promote_types(dtype, torch.float32))

    def colour(self) -> Tensor:
        return self.uniform(self.colours)

    def integers(self, low: int, high: int) -> Tensor:
        """From ``low`` up to, but excluding, ``high``."""
        return torch.randint(low, high, (self.images,), **self._next())

    def one_of(self, choices: Sequence[str]) -> str:
        return choices[int(torch.randint(0, len(choices), (1,), **self._next()))]


@dataclass(frozen=True)
class DiffAugment:
    """The augmentation that `pydistill.unroll`, `trajectory_match` and `train_students` take as ``augment``.

    ``draw`` draws a batch's parameters, ``__call__`` applies them by `pydistill.ops.augment_images`, any number
    of times, with the same bits. A record is a plain float32 tensor of 52 bytes per image. ::

        augment = DiffAugment("color_crop_cutout_flip_scale_rotate")
        record = augment.draw(images.shape, generator)
        augmented = augment(images, record)

    Subclasses may override `draw`, `shape_after` and `__call__`: the loops call these three and nothing else, on the
    student engine as on autograd, and keep a record as `draw` returned it. (Records of this class itself are moved to
    a GPU together; a subclass moves its own, in `__call__`.)

    Args:
        strategy: names out of "color", "crop", "cutout", "flip", "scale" and "rotate", joined by "_"; "none" or "" for
            none of them. A name given twice is twice as likely in mode "single".
        siamese: one draw for all images of a batch, as in gradient and distribution matching; else one for each, as in
            trajectory matching and in evaluation.
        mode: "single": one of the operations, drawn for each batch, as in all repositories; "all": each of them, in
            the order above, in which the strategy must name them.
        flip_batch: augment ``cat([images, images.flip(3)])``: twice as many images come out, and the loops that take
            this object repeat the labels.
        prob_flip: probability of mirroring an image, in "flip".
        ratio_scale: r; "scale" draws both factors from U(1/r, r).
        ratio_rotate: in degrees; "rotate" draws from U(-ratio_rotate, ratio_rotate).
        ratio_crop_pad: "crop" shifts by up to ``int(ratio_crop_pad * side + 0.5)`` pixels, either way.
        ratio_cutout: "cutout" zeroes ``int(ratio_cutout * side + 0.5)`` pixels a side about a centre anywhere.
        brightness: "color" adds U(-brightness / 2, brightness / 2),
        saturation: multiplies the distance from the pixel's mean by U(0, saturation),
        contrast: and that from the image's mean by U(contrast, 1 + contrast).
        align_corners: of the grids of "scale" and "rotate"; no difference for square images.

    Raises:
        ValueError: an option is out of range, or the strategy names an unknown operation.
    """

    strategy: str = "_".join(OPERATIONS)
    siamese: bool = False
    mode: Literal["single", "all"] = "single"
    flip_batch: bool = False
    prob_flip: float = 0.5
    ratio_scale: float = 1.2
    ratio_rotate: float = 15.0
    ratio_crop_pad: float = 0.125
    ratio_cutout: float = 0.5
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    align_corners: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise TypeError(f"strategy: expected a str, got {type(self.strategy).__name__}")
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(
                    f"strategy: expected names out of {', '.join(OPERATIONS)}, joined by '_', or 'none', got {name!r} "
                    f"in {self.strategy!r}{meant(name, OPERATIONS)}"
                )
        for flag in ("siamese", "flip_batch", "align_corners"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag}: expected True or False, got {getattr(self, flag)!r}")
        check_choice("mode", self.mode, ("single", "all"))
        if self.mode == "all" and list(self.operations) != [name for name in OPERATIONS if name in self.operations]:
            raise ValueError(
                f"strategy: mode='all' applies operations in the order {'_'.join(OPERATIONS)}, got {self.strategy!r}"
            )
        lowest = dict.fromkeys(("ratio_rotate", "ratio_crop_pad", "ratio_cutout", "brightness"), 0.0)
        for name, low in {**lowest, "prob_flip": 0.0, "saturation": 0.0, "contrast": 0.0, "ratio_scale": 1.0}.items():
            value = getattr(self, name)
            high = 1.0 if name == "prob_flip" else math.inf
            if not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not low <= value <= high or value == math.inf:
                wanted = f"from {low:g} to 1" if name == "prob_flip" else f">= {low:g}"
                raise ValueError(f"{name}: expected a finite number {wanted}, got {value}")

    @property
    def operations(self) -> tuple[str, ...]:
        return () if self.strategy in ("none", "None", "") else tuple(self.strategy.split("_"))

    @property
    def copies(self) -> int:
        """How many images come out for each input image."""
        return 2 if self.flip_batch else 1

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """The parameters for a batch.

        Args:
            shape: ``[B, C, H, W]`` of the images.
            generator: torch's default one on the CPU when None.

        Returns:
            The record, float32 ``[B, 13]``, ``[2 * B, 13]`` for ``flip_batch``, on the generator's device: see
            `pydistill.ops.augment_images` for its columns.
        """
        check_image_shape(shape)
        return self._record(shape, _Draws(1 if self.siamese else self._rows(shape), generator))

    def shape_after(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the result, given that of the images."""
        return (self._rows(shape), *shape[1:])

    def _rows(self, shape: Sequence[int]) -> int:
        return shape[0] * self.copies

    def _record(self, shape: Sequence[int], draws: _Draws) -> Tensor:
        H, W = shape[2:]
        operations = self.operations
        if self.mode == "single" and operations:
            operations = (draws.one_of(operations),)
        found: dict[str, Any] = dict(IDENTITY)
        for name in operations:
            found |= getattr(self, f"_{name}")(draws, H, W)
        columns = [torch.as_tensor(found[c], dtype=torch.float32, device=draws.device) for c in COLUMNS]
        record = torch.stack([column.expand(draws.images) for column in columns], 1)
        return record.expand(self._rows(shape), -1) if self.siamese else record

    def _color(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        return {
            "brightness": (draws.colour() - 0.5) * self.brightness,
            "saturation": draws.colour() * self.saturation,
            "contrast": draws.colour() + self.contrast,
        }

    def _crop(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        down, across = (int(self.ratio_crop_pad * side + 0.5) for side in (H, W))
        return {"crop_y": draws.integers(-down, down + 1), "crop_x": draws.integers(-across, across + 1)}

    def _cutout(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        height, width = (int(self.ratio_cutout * side + 0.5) for side in (H, W))
        # the centre of an even number of pixels lies between two, and may be at either border
        return {
            "cutout_top": draws.integers(0, H + 1 - height % 2) - height // 2,
            "cutout_left": draws.integers(0, W + 1 - width % 2) - width // 2,
            "cutout_height": height,
            "cutout_width": width,
        }

    def _flip(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        return {"flip": draws.uniform() < self.prob_flip}

    def _scale(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        least = 1 / self.ratio_scale
        span = self.ratio_scale - least
        return {"scale_x": draws.uniform() * span + least, "scale_y": draws.uniform() * span + least}

    def _rotate(self, draws: _Draws, H: int, W: int) -> dict[str, Any]:
        return {"angle": (draws.uniform() - 0.5) * 2 * self.ratio_rotate / 180 * math.pi}

    def __call__(self, images: Tensor, record: Tensor) -> Tensor:
        """``[B, C, H, W]`` images, or with ``flip_batch`` ``[2 * B, C, H, W]``, augmented by the record of `draw`."""
        if not self.operations and not self.flip_batch:
            return images
        if not isinstance(record, Tensor):
            raise TypeError(f"record: expected what draw returns, a tensor, got {type(record).__name__}")
        record = to_device(record, images.device)
        return augment_images(images, record, flip_batch=self.flip_batch, align_corners=self.align_corners)


def diff_augment(
    images: Tensor, strategy: str = "", seed: int = -1, param: Any = None, *, align_corners: bool = True
) -> Tensor:
    """The repositories' ``DiffAugment(x, strategy, seed, param)``: draws and applies at once.

    Parameters are those that they draw for images on the CPU from the same seed (or, with seed -1, from the same state
    of torch's default generator), colours drawn in the images' dtype as there, kept in float32. Unlike theirs, it
    leaves the default generator alone if a seed is given.

    Args:
        images: ``[B, C, H, W]``.
        strategy: as in `DiffAugment`.
        seed: -1: a draw for each image; any other: siamese, one draw for all.
        param: an object with the attributes of the repositories' ``ParamDiffAug``: ``aug_mode`` ("S" or "M") and the
            ratios; their defaults when None.
        align_corners: of the grids of "scale" and "rotate": MTT and its descendants use True, DC, DSA and DM torch's
            default False. It makes a difference only for images that are not square.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        TypeError, ValueError: images that are not ``[B, C, H, W]``, a seed that is not an int, or as `DiffAugment`.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"images: expected [B, C, H, W], got shape {list(images.shape)}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    options = {} if param is None else {name: getattr(param, name) for name in _RATIOS}
    if param is not None:
        if param.aug_mode not in ("S", "M"):
            raise ValueError(f"param.aug_mode: expected 'S' or 'M', got {param.aug_mode!r}")
        options["mode"] = "single" if param.aug_mode == "S" else "all"
    augment = DiffAugment(strategy, siamese=seed != -1, align_corners=align_corners, **options)
    if not augment.operations:
        return images
    if seed == -1:
        draws = _Draws(len(images), None, colours=images.dtype)
    else:
        draws = _Draws(1, torch.Generator(), seed, images.dtype)
    return augment(images, augment._record(images.shape, draws))


_RATIOS = (
    *("prob_flip", "ratio_scale", "ratio_rotate", "ratio_crop_pad", "ratio_cutout"),
    *("brightness", "saturation", "contrast"),
)
