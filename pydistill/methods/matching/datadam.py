"""DataDAM: distilling datasets by matching attention.

Sajedi, Khaki, Amjadian, Liu, Lawryshyn, Plataniotis, "DataDAM: Efficient Dataset Distillation with Attention Matching",
ICCV 2023. Like DM, but the spatial attention of every activation except the last is matched too, class by class. The
paper has power 4 on networks with instance norm; the published code has power 1, batch norm, 64 real images per class
and 20000 iterations: ``power=1.0, net_norm="batch", batch_real=64, iterations=20000``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.data import Dataset
from pydistill.matching import class_mean_match, features, match_maps
from pydistill.methods.matching.dm import DIGITS, DM
from pydistill.methods.matching.pairs import Pairs
from pydistill.methods.outer import State
from pydistill.nn import ConvNet
from pydistill.ops.convnet_step import Workspace
from pydistill.seeding import torch_seeded

_SMALL = {"iterations": 300, "batch_real": 64}
PUBLISHED_CODE = {"power": 1.0, "net_norm": "batch", "batch_real": 64, "iterations": 20000}


@dataclass(frozen=True)
class DataDAM(DM):
    """DM's hyper-parameters, and DataDAM's."""

    name: ClassVar[str] = "datadam"
    about: ClassVar[str] = "match mean features and spatial attention"
    paper: ClassVar[str] = "Sajedi et al., ICCV 2023"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": dict.fromkeys((1, 10), _SMALL | DIGITS | {"lr_img": 0.1}),
        "fashion-mnist": dict.fromkeys((1, 10), _SMALL | {"lr_img": 0.3}),
        **{name: {1: {}, 10: {}, 50: {"lr_img": 10.0}} for name in ("cifar10", "cifar100", "tiny-imagenet")},
    }
    axis: ClassVar[Literal["spatial", "both"]] = "spatial"  # of the attention

    iterations: int = 8000
    """Iterations, each with a new network."""
    batch_real: int = 128
    """Real images of each class in an iteration, or all there are if fewer."""
    power: float = 4.0
    """Power p of the activations in the attention maps."""
    norm: Literal["l2", "l1", "none"] = "l2"
    """The norm that an attention map is divided by."""
    last_layer: bool = False
    """Match the last activation's attention, too."""
    scale: float = 100.0
    """Weight of the attention's distance."""
    task_balance: float = 0.01
    """Weight of the mean embeddings' distance, multiplied by scale."""
    net_norm: Literal["instance", "batch"] = "instance"
    """Normalisation of the networks that are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power: expected a number above zero, got {self.power}")

    def check(self, dataset: Dataset, net: nn.Module, experts: Any) -> None:
        super().check(dataset, net, experts)
        if self.net_norm == "batch" and not isinstance(net, ConvNet):
            raise ValueError(f"net_norm: expected 'instance' for a {type(net).__name__}, whose norm is its own")

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: Any) -> dict[str, Any]:
        if self.net_norm == "batch":
            like, net = state["images"], cast(ConvNet, net)
            sizes = (net.channels, dataset.num_classes, net.width, net.depth, net.image_size)
            net = _with_batch_norm(threading.get_ident(), *sizes, like.device, like.dtype)
        return super().step(state, dataset, net, experts)

    def distance(self, net: nn.Module, theta: Tensor, pairs: Pairs, num_classes: int) -> Tensor:
        workspace = Workspace()
        layers = self._layers(net)
        found = partial(features, net, theta, p=self.power, axis=self.axis, layers=layers, workspace=workspace)
        with torch.no_grad():
            real = found(pairs.real, precision=self.precision)
        synthetic = found(pairs.synthetic)
        labels = [to_device(labels, theta.device) for labels in (pairs.labels_real, pairs.labels_synthetic)]
        embedding = class_mean_match(real.embedding, synthetic.embedding, *labels, num_classes=num_classes)
        attention = match_maps(
            real.spatial + real.channel,
            synthetic.spatial + synthetic.channel,
            *labels,
            norm=self.norm,
            num_classes=num_classes,
        )
        return self.scale * (attention + self.task_balance * embedding)

    def _layers(self, net: nn.Module) -> list[int] | None:
        if not self.last_layer:
            return None
        if not isinstance(net, ConvNet):
            raise ValueError(
                f"last_layer: expected False for a {type(net).__name__}, whose activations are not counted"
            )
        return list(range(net.depth))


@lru_cache(maxsize=4)
def _with_batch_norm(
    thread: int,
    channels: int,
    num_classes: int,
    width: int,
    depth: int,
    image_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> ConvNet:
    """Only its structure is used, in every step of a thread the same: functional calls put parameters into it."""
    with torch_seeded(torch.Generator().manual_seed(0)):
        return ConvNet(channels, num_classes, width, depth, image_size, norm="batch").to(device, dtype)
