"""Random resized crops, flips, rolls and mixes: how to draw them, and CDA's curriculum of crop sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pydistill._arguments import check_choice, check_image_shape
from pydistill._devices import to_device
from pydistill.ops.multi_crop import COLUMNS, MAX_SIZE, multi_crop

Column = Tensor | float
TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to the centre


@dataclass(frozen=True)
class MultiCrop:
    """Random crops of a batch of images: ``draw`` draws a record, ``__call__`` applies it, any number of times.

    Crops are distributed as those of torchvision's ``RandomResizedCrop.get_params`` (ten tries, then the centre). ::

        augment = MultiCrop(224, scale=(0.08, 1.0), roll=32, shared=True, mean=MEAN, std=STD)  # SRe2L's recovery
        record = augment.draw(images.shape, generator)
        x = augment(images, record)  # differentiable in images

    Args:
        out_size: height and width of the results, an int for both.
        scale: bounds of a crop's area as a share of the image's.
        ratio: bounds of a crop's width over its height, whose logarithm is uniform.
        flip: probability of mirroring.
        roll: r; both axes are rolled by U{0, ..., r} pixels.
        mean, std: what results are normalised by, one number per channel each; see `pydistill.ops.multi_crop`.
        mix: "mixup" and "cutmix": every crop with that of another image, in a random permutation, with one lambda from
            Beta(alpha, alpha) and one box per batch, as in SRe2L's relabelling. "mosaic": four crops, of four images,
            as tiles in two rows and columns, each resized to its tile (RDED, PCA), flipped and rolled independently.
        alpha: of the Beta distribution.
        shared: one draw of crop, flip and roll for all images of a batch, as in SRe2L's recovery.

    Raises:
        ValueError: an option is out of range.
    """

    out_size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    roll: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mix: Literal["mixup", "cutmix", "mosaic"] | None = None
    alpha: float = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(side, int) for side in self.size):
            raise TypeError(f"out_size: expected a whole number of pixels or (height, width), got {self.out_size!r}")
        for name in ("flip", "roll", "alpha"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name}: expected a number, got {getattr(self, name)!r}")
        if min(self.size) < (2 if self.mix == "mosaic" else 1) or max(self.size) > MAX_SIZE:
            raise ValueError(f"out_size: expected sides of 1 to {MAX_SIZE} (2 for a mosaic), got {self.out_size!r}")
        for name in ("scale", "ratio"):
            if not isinstance(getattr(self, name), (tuple, list)) or len(getattr(self, name)) != 2:
                raise TypeError(f"{name}: expected (low, high), got {getattr(self, name)!r}")
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}: expected (low, high) with 0 < low <= high, got {(low, high)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")
        if not 0 <= self.roll <= MAX_SIZE:
            raise ValueError(f"roll: expected 0 to {MAX_SIZE} pixels, got {self.roll}")
        if self.mix not in (None, "mixup", "cutmix", "mosaic"):
            raise ValueError(f"mix: expected 'mixup', 'cutmix', 'mosaic' or None, got {self.mix!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number above zero, got {self.alpha}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: expected both or neither")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the results."""
        both = self.out_size if isinstance(self.out_size, (tuple, list)) else (self.out_size, self.out_size)
        return cast(tuple[int, int], both)

    def shape_after(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the result, given that of the images, with one crop of each."""
        return (*shape[:2], *self.size)

    def draw(
        self, shape: Sequence[int], generator: torch.Generator | None = None, *, sources: Tensor | None = None
    ) -> Tensor:
        """The parameters of a batch.

        Args:
            shape: ``[N, C, H, W]`` of the images.
            generator: torch's default one on the CPU when None.
            sources: ``[B]``, the image that each result is made from; one result per image when None. For a mosaic
                optionally ``[B, 4]``, its tiles row by row; otherwise the others are random permutations of the first.

        Returns:
            The record, float32 ``[B, P, 14]`` on the generator's device, P being 1, 2 for mixup and cutmix and 4 for a
            mosaic: see `pydistill.ops.multi_crop` for its columns.

        Raises:
            ValueError: ``sources`` have another shape or name a nonexistent image.
        """
        check_image_shape(shape)
        N, _, H, W = shape
        device = "cpu" if generator is None else generator.device
        if sources is None:
            sources = torch.arange(N, device="cpu")
        sources = sources.to(device)
        tiles = 4 if self.mix == "mosaic" else 1
        if sources.dim() != 1 and sources.shape[1:] != (tiles,):
            wanted = "[B] or [B, 4]" if tiles == 4 else "[B]"
            raise ValueError(f"sources: expected shape {wanted}, got {list(sources.shape)}")
        if sources.numel() and not (int(sources.min()) >= 0 and int(sources.max()) < min(N, 2**24)):
            raise ValueError(f"sources: expected numbers of images, 0 to {min(N, 2**24) - 1}, got others")
        if sources.dim() == 1:
            more = (sources[torch.randperm(len(sources), generator=generator, device=device)] for _ in range(tiles - 1))
            sources = torch.stack([sources, *more], 1)
        drawn = self._crops((1 if self.shared else len(sources), tiles), H, W, generator, device)
        record = self._record(drawn | self._tiles(tiles, device), sources)
        if self.mix in ("mixup", "cutmix"):
            other = record[torch.randperm(len(record), generator=generator, device=device)]
            record = torch.cat([record, self._mixed(other, generator, device)], 1)
        return record

    def __call__(self, images: Tensor, record: Tensor, *, base: Tensor | None = None) -> Tensor:
        """``[B, C, *size]`` of ``[N, C, H, W]`` images, with ``base`` ``[1, C, H, W]`` added to each of them first."""
        if not isinstance(record, Tensor):
            raise TypeError(f"record: expected what draw returns, a tensor, got {type(record).__name__}")
        return multi_crop(images, to_device(record, images.device), self.size, base=base, mean=self.mean, std=self.std)

    def _record(self, columns: dict[str, Column], sources: Tensor) -> Tensor:
        columns = columns | {"source": sources}
        found = [torch.as_tensor(columns[name], dtype=torch.float64, device=sources.device) for name in COLUMNS]
        return torch.stack([column.expand(sources.shape) for column in found], 2).float()

    def _crops(
        self, rows: tuple[int, int], H: int, W: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Column]:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, *rows, generator=generator, device=device, dtype=torch.float64)

        def integers(most: Tensor | int) -> Tensor:  # 0 to most
            return (uniform() * (most + 1)).floor()

        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        area = H * W * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform(TRIES))
        aspect = (low + (high - low) * uniform(TRIES)).exp()
        width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
        first = fits.to(torch.uint8).argmax(0, keepdim=True)  # the first of several largest
        found = fits.any(0)
        centre_height, centre_width = self._centre(H, W)
        height = torch.where(found, height.gather(0, first)[0], float(centre_height))
        width = torch.where(found, width.gather(0, first)[0], float(centre_width))
        return {
            "top": torch.where(found, integers(H - height), float((H - centre_height) // 2)),
            "left": torch.where(found, integers(W - width), float((W - centre_width) // 2)),
            **{"height": height, "width": width, "flip": uniform() < self.flip},
            **{"roll_y": integers(self.roll), "roll_x": integers(self.roll)},
        }

    def _centre(self, H: int, W: int) -> tuple[int, int]:
        """If no try fits: as much of the image as the ratio allows."""
        if self.ratio[0] > W / H:
            return round(W / self.ratio[0]), W
        if self.ratio[1] < W / H:
            return H, round(H * self.ratio[1])
        return H, W

    def _tiles(self, tiles: int, device: torch.device | str) -> dict[str, Column]:
        H, W = self.size
        if tiles == 1:
            return {"fit": 0.0, "to_top": 0.0, "to_left": 0.0, "to_height": H, "to_width": W, "alpha": 1.0}
        h, w = H // 2, W // 2
        places = {"to_top": (0, 0, h, h), "to_left": (0, w, 0, w)}
        places |= {"to_height": (h, h, H - h, H - h), "to_width": (w, W - w, w, W - w)}
        return {"fit": 1.0, "alpha": 1.0, **{name: torch.tensor(v, device=device) for name, v in places.items()}}

    def _mixed(self, other: Tensor, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """The second part of every record: another's first, with its alpha or its place."""
        weights = torch.full((2,), self.alpha, dtype=torch.float64, device=device)
        lam = float(torch._sample_dirichlet(weights, generator)[0])
        other = other.clone()
        if self.mix == "mixup":
            other[..., COLUMNS.index("alpha")] = 1 - lam
            return other
        for axis, place, side in (("top", "to_height", self.size[0]), ("left", "to_width", self.size[1])):
            cut = int(side * math.sqrt(1 - lam))
            centre = int(torch.randint(side, (), generator=generator, device=device))
            begin, end = max(centre - cut // 2, 0), min(centre + cut // 2, side)
            other[..., COLUMNS.index(f"to_{axis}")] = begin
            other[..., COLUMNS.index(place)] = end - begin
        return other


def crop_schedule(
    kind: Literal["step", "linear", "cosine"],
    iteration: int,
    iterations: int,
    milestone: float = 1.0,
    lowest: float = 0.08,
) -> float:
    """The least area of a crop at an iteration: from 1 down to ``lowest`` within ``milestone * iterations``.

    CDA's curriculum ("Dataset Distillation via Curriculum Data Synthesis in Large Data Era", Yin and Shen, TMLR 2024):
    whole images first, then crops as small as SRe2L's. For ``MultiCrop(..., scale=(crop_schedule(...), 1.0))``.

    Args:
        kind: "step": 1 until the end; "linear"; "cosine": ``lowest + (1 - lowest) * (1 + cos(pi * i / end)) / 2``.
        iteration: from 0.
        iterations: of the whole run.
        milestone: share of them after which ``lowest`` holds.
        lowest: a share of an image's area.

    Raises:
        ValueError: an argument is out of range.
    """
    check_choice("kind", kind, ("step", "linear", "cosine"))
    if iteration < 0 or iterations < 1:
        raise ValueError(f"iteration, iterations: expected >= 0 and >= 1, got {iteration} and {iterations}")
    for name, value in (("milestone", milestone), ("lowest", lowest)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a share above 0 and at most 1, got {value}")
    end = milestone * iterations
    if iteration >= end:
        return lowest
    share = {"step": 1.0, "linear": 1 - iteration / end, "cosine": (1 + math.cos(math.pi * iteration / end)) / 2}
    return lowest + (1 - lowest) * share[kind]
