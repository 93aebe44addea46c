"""A small label store, and what is written to it."""

import struct

import numpy as np
import torch

from pydistill.labels import SoftLabelStore

N, C, EPOCHS, BATCH, RECORD = 25, 12, 3, 8, 5
T = 4.0
OPTIONS = {
    **{"num_images": N, "num_classes": C, "epochs": EPOCHS, "batch_size": BATCH, "record_bytes": RECORD},
    **{"T": T, "format": "topk8", "k": 3},
}
ENTRY = 24


def create(path, **options):
    return SoftLabelStore.create(path, **{**OPTIONS, **options})


def batches(epoch, images=None):
    ids = np.arange(N) if images is None else np.asarray(images)
    order = np.random.default_rng(epoch).permutation(ids)
    return np.split(order, range(BATCH, len(order), BATCH))


def logits(epoch, ids=None):
    values = torch.randn(N, C, generator=torch.Generator().manual_seed(epoch)) * 3
    return values if ids is None else values[torch.as_tensor(np.asarray(ids))]


def records(epoch, ids):
    return np.stack([np.frombuffer(struct.pack("<BI", epoch, 1000 + i), np.uint8) for i in ids])


def fill(store, epochs=range(EPOCHS), images=None):
    for epoch in epochs:
        for block, ids in enumerate(batches(epoch, images)):
            if not store.holds(epoch, block):
                labels = logits(epoch, ids)
                store.write(epoch, ids, labels.softmax(1) if store.target == "probs" else labels, records(epoch, ids))


def row_at(store, epoch, block):
    return store._blocks_at + (epoch * store.blocks + block) * store._block_bytes + store._ids_bytes


def flip(path, at):
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
