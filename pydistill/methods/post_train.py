"""Post-train: a student learns a distilled set from the stored labels of the very views that it sees.

    loss = KL(softmax(teacher / T) || softmax(student / T))

without the factor T^2, as in SRe2L's code, by AdamW under half a cosine. No teacher is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.augment import mix_labels
from pydistill.data import DistilledSet
from pydistill.labels import SoftLabelStore
from pydistill.methods.options import check_numbers
from pydistill.methods.relabel import Relabel, check_store, replayed
from pydistill.methods.squeeze import NetworkName, build
from pydistill.methods.training import OnEpoch, train
from pydistill.seeding import Stream, seeded_net

__all__ = ["PostTrain", "new_student", "post_train"]


@dataclass(frozen=True)
class PostTrain:
    """How a student is trained on a distilled set: AdamW under half a cosine, one view of each image an epoch."""

    network: NetworkName = "resnet18"
    """convnet is the ConvNet of the condensation papers with BatchNorm."""
    width: int = 64
    """Channels of the (first) stage."""
    depth: int = 3
    """Blocks of convnet."""
    lr: float = 1e-3
    """Of AdamW, at its start."""
    weight_decay: float = 0.01
    """Of AdamW."""
    seed: int = 0
    """Of the initial parameters."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"network": "convnet", "width": 32},
        "fashion-mnist": {"network": "convnet", "width": 32},
    }

    @classmethod
    def preset(cls, dataset: str) -> PostTrain:
        """The values for a data set; the defaults for one that is not known."""
        return replace(cls(), **cls.presets.get(dataset, {}))

    def __post_init__(self) -> None:
        check_numbers(self, width=1, depth=1, lr=0.0, weight_decay=0, seed=0)


def new_student(
    config: PostTrain,
    distilled: DistilledSet,
    views: Relabel,
    store: SoftLabelStore | None,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The student before its training; raises what `post_train` does where its arguments do not fit."""
    _, channels, side, _ = distilled.images.shape
    if store is not None:
        if store.num_classes != num_classes:
            raise ValueError(f"store: expected labels of {num_classes} classes, got {store.num_classes}")
        check_store(store, views, distilled)
        store.check_complete()
    elif distilled.label_kind != "hard" or int(distilled.labels.max()) >= num_classes:
        raise ValueError(f"labels: expected hard labels of {num_classes} classes where there is no store, got others")
    options = {"channels": channels, "num_classes": num_classes, "image_size": side}
    make = partial(build, config.network, width=config.width, depth=config.depth, **options)
    return seeded_net(make, config.seed, Stream.POST_TRAINED, device=device)


def post_train(
    config: PostTrain,
    distilled: DistilledSet,
    views: Relabel,
    store: SoftLabelStore | None = None,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
    state: dict[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
) -> nn.Module:
    """Trains a fresh student on a distilled set and returns it, in evaluation mode.

    Args:
        config: the student.
        distilled: the images.
        views: what the store was made with: the epochs, batches and views.
        store: of soft labels; without one, the set's own hard labels on the same views, mixed as the images are.
        num_classes: of the student.
        device: where the work is done.
        state, on_epoch: as `pydistill.methods.training.train` takes them.

    Raises:
        ValueError: a store of other images, classes or views, or without all epochs, which are named.
    """
    net = new_student(config, distilled, views, store, num_classes=num_classes, device=device)
    images = distilled.images.to(device)
    count, side = images.shape[0], images.shape[2]
    optimizer = torch.optim.AdamW(net.parameters(), config.lr, weight_decay=config.weight_decay)
    crops = views.crops(side)

    def soft(epoch: int) -> Iterator[Any]:
        for index in store.batches(epoch):
            labels = store.read(epoch, index).to(device)
            x = crops(images, replayed(labels))
            yield lambda x=x, labels=labels: labels.loss(net(x))

    def hard(epoch: int) -> Iterator[Any]:
        for _, record in views.views(images.shape, epoch):
            target = mix_labels(distilled.labels, record, side, classes=num_classes).to(device)
            x = crops(images, record)
            yield lambda x=x, target=target: F.cross_entropy(net(x), target)

    train(
        *(net, optimizer, hard if store is None else soft),
        **{"epochs": views.epochs, "steps": -(-count // views.batch_size), "state": state, "on_epoch": on_epoch},
    )
    return net.eval()
