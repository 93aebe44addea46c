"""Student networks by name."""

from __future__ import annotations

from typing import Any, Literal

from pydistill._arguments import check_choice
from pydistill.nn.alexnet import AlexNet
from pydistill.nn.convnet import ConvNet
from pydistill.nn.mlp import MLP
from pydistill.nn.small_resnet import SmallResNet18
from pydistill.nn.student import Student, is_large, sides
from pydistill.nn.vgg import VGG11
from pydistill.nn.vit import ViT

# the class, and the options it is built with
_NETS: dict[str, tuple[type[Student], dict[str, Any]]] = {
    "convnet": (ConvNet, {}),
    "mlp": (MLP, {}),
    "alexnet": (AlexNet, {}),
    "vgg11": (VGG11, {}),
    "resnet18": (SmallResNet18, {}),
    "resnet18_ap": (SmallResNet18, {"average_pool": True}),
    "vit": (ViT, {}),
}
NetName = Literal["convnet", "mlp", "alexnet", "vgg11", "resnet18", "resnet18_ap", "vit"]
NETS = tuple(_NETS)


def make(
    name: str,
    channels: int,
    num_classes: int,
    image_size: int | tuple[int, int],
    width: int | None = None,
    depth: int | None = None,
    norm: str | None = None,
) -> Student:
    """Builds a student network by its name, as the method repositories define it.

    Args:
        name: "convnet", "mlp", "alexnet", "vgg11", "resnet18", "resnet18_ap" or "vit".
        channels: of the input images ``[N, channels, H, W]``.
        num_classes: logits per image.
        image_size: height and width of the images in pixels, one int for both or (H, W).
        width: of "convnet" and "mlp", 128 by default, and of "vit", 64 by default.
        depth: of "convnet", by default 3 blocks, 4 from 64 pixels on, and of "vit", by default 4.
        norm: "instance", "batch" or "none" ("convnet": also "group" and "layer"; "mlp" and "vit" take none); by default
            what the repositories' network of that name has, "none" in AlexNet and "instance" in the others.

    Raises:
        ValueError: an unknown name, an option that the network does not have, or as for the network itself.
    """
    check_choice("name", name, NETS)
    net, options = _NETS[name]
    if name == "convnet" and depth is None:
        depth = 4 if is_large(sides(image_size)) else 3
    takes = {"convnet": ("width", "depth", "norm"), "mlp": ("width",), "vit": ("width", "depth")}.get(name, ("norm",))
    for option, value in (("width", width), ("depth", depth), ("norm", norm)):
        if value is None:
            continue
        if option not in takes:
            raise ValueError(f"{option}: expected none, {name} has no such option, got {value!r}")
        options = options | {option: value}
    return net(channels, num_classes, image_size=image_size, **options)
