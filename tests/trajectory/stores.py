"""A small expert store, and what is appended to it."""

import torch

from pydistill import ExpertStore
from pydistill.nn import ConvNet

E, EPOCHS = 4, 3


def make_net(width=4):
    return ConvNet(1, 3, width=width, depth=1, image_size=6)


NUMEL = sum(p.numel() for p in make_net().parameters())


def trajectories(experts=E, epochs=EPOCHS):
    return torch.randn(experts, epochs + 1, NUMEL, generator=torch.Generator().manual_seed(1))


def create(path, **options):
    return ExpertStore.create(path, make_net(), **{"experts": E, "epochs": EPOCHS, **options})


def vectors(store, rows):
    return {name: rows + i for i, name in enumerate(store.state_names, 1)}


def fill(store, rows, groups=(range(E),)):
    for epoch in range(rows.shape[1]):
        for group in groups:
            theta = rows[group.start : group.stop, epoch]
            store.append(group, epoch, theta, vectors(store, theta))
