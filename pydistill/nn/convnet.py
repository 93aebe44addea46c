"""The ConvNet that dataset-distillation methods train."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pydistill._arguments import check_whole
from pydistill.nn.acceleration import accelerate
from pydistill.nn.student import Student

_ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "leakyrelu": lambda: nn.LeakyReLU(0.01), "sigmoid": nn.Sigmoid}
_NORMS: dict[str, Callable[[int, tuple[int, ...]], nn.Module] | None] = {
    "instance": lambda C, size: nn.GroupNorm(C, C),
    "group": lambda C, size: nn.GroupNorm(4, C),
    "batch": lambda C, size: nn.BatchNorm2d(C),
    "layer": lambda C, size: nn.LayerNorm([C, *size]),
    "none": None,
}
_POOLS: dict[str, Callable[[], nn.Module] | None] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": None,
}


class ConvNet(Student):
    """``depth`` blocks of 3x3 convolution, norm, activation and 2x2 pool, then a linear classifier.

    Structure, parameter order and ``state_dict`` keys (``features.<i>``, ``classifier``) are those of the ConvNet in
    the dataset-condensation line of repositories (Zhao et al., ICLR 2021), so that flat parameter vectors and expert
    trajectories can be exchanged: "instance" is ``GroupNorm(C, C)``, and a one-channel input is padded by 3 in the
    first convolution (28x28 becomes 32x32). Blocks of instance norm, ReLU and average pool run as one fused operator.

    Args:
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        width: channels of every block.
        depth: number of blocks; each halves the image, odd sizes floored.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        norm: "instance", "group" (four groups), "batch", "layer" or "none".
        act: "relu", "leakyrelu" or "sigmoid".
        pool: "avg", "max" or "none".

    Raises:
        ValueError: an unknown name, or images too small for the depth; a forward input of another shape.
    """

    features: nn.Sequential

    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int = 128,
        depth: int = 3,
        image_size: int | tuple[int, int] = 32,
        norm: str = "instance",
        act: str = "relu",
        pool: str = "avg",
    ):
        super().__init__(channels, num_classes, image_size)
        for name, value, known in (("norm", norm, _NORMS), ("act", act, _ACTIVATIONS), ("pool", pool, _POOLS)):
            self._require(name, value, tuple(known))
        check_whole("width", width, 1)
        check_whole("depth", depth, 1)
        self.width, self.depth = width, depth
        size: tuple[int, ...] = self.image_size
        make_norm, make_pool = _NORMS[norm], _POOLS[pool]
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if channels == 1 and block == 0 else 1
            size = tuple(s + 2 * padding - 2 for s in size)
            layers.append(nn.Conv2d(channels if block == 0 else width, width, 3, padding=padding))
            if make_norm is not None:
                layers.append(make_norm(width, size))
            layers.append(_ACTIVATIONS[act]())
            if make_pool is not None:
                layers.append(make_pool())
                size = tuple(s // 2 for s in size)
            if min(size) < 1:
                raise ValueError(f"depth: {depth} blocks leave nothing of a {self.image_size} image")
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * size[0] * size[1], num_classes)
        if norm == "instance":
            accelerate(self)
