"""Random streams by name.

What is drawn for one purpose depends only on a run's seed and on the purpose's name and position: a run that is
interrupted and resumed, or divided among other ranks, draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TypeVar

import torch
from numpy.random import SeedSequence
from torch import nn

Net = TypeVar("Net", bound=nn.Module)

__all__ = ["Stream", "seeded_generator", "seeded_net", "torch_seeded"]


class Stream(IntEnum):
    """The purpose of a stream: the second number of a key, after the seed.

    The numbers affect every result, so they must not change. Names that share one are used in different commands.
    """

    # networks trained on real images: experts, teachers, students of a table
    EXPERT = 0  # + expert: its parameters
    EXPERT_BATCHES = 1  # + expert, epoch
    TEACHER = 0
    TEACHER_BATCHES = 1  # + epoch
    TEST_STUDENT = 2  # + student: its parameters
    TEST_STUDENT_BATCHES = 3  # + student
    TEST_REAL_IMAGES = 4  # + student: the real images that a method is compared with

    # methods with an outer loop
    SYNTHETIC = 5  # the initial synthetic images (+ client)
    OUTER_STEP = 6  # + iteration (+ turn, class, client): segments, minibatches, augmentations
    OUTER_STEP_NET = 7  # + iteration: a new network's parameters
    INNER_TRAINING = 8  # + iteration, turn: of DC's network between its outer steps

    # picked images
    PICKING = 5  # a network's parameters, and its batches
    BINS = 6  # + class: the order within DQ's bins
    COMBINED = 7  # + class: the images that PCA combines

    # decoupled methods
    REAL_START = 0  # the real images that recovery starts from
    RECOVER_CROPS = 1  # + batch, iteration
    NOISE_START = 2  # + batch
    RELABEL_BATCHES = 1  # + epoch
    POST_TRAINED = 3  # the student's parameters

    # KRR-ST
    TARGET = 10  # the self-supervised encoder
    SELF_SUPERVISED = 11  # its projector, then its batches
    POOL = 20  # + number: the parameters of a network of the pool
    POOL_AGES = 21
    KRR_BATCH = 22  # + iteration
    KRR_IMAGES = 23  # the real images that the synthetic ones start from
    PRETRAINED = 30  # + student: the parameters of a student that is pretrained and probed

    # HeLlO
    PROJECTOR = 40
    VIEWS = 41  # + epoch: a student's augmentations
    FIT_BATCHES = 42  # the projector's minibatches, augmented
    STUDENT_BATCHES = 43  # + student, epoch
    ENCODER = 44
    PROJECTED_TEACHER = 45  # + number: its parameters
    PROJECTED_STUDENT = 46  # + number: its parameters
    PROJECTED_TEACHER_BATCHES = 47  # + number

    # UNIP
    UNIP_TEACHER = 0  # its parameters; and, + epoch, its order of the images
    UNIP_STUDENT = 1  # likewise


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator whose stream depends on ``seed`` and ``key`` alone: integers of at least 0.

    Trailing zeros make no difference, so keys for the same purpose must have the same length.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: expected a whole number of at least 0, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed}")
    return torch.Generator().manual_seed(int(SeedSequence((seed, *key)).generate_state(1, "uint64")[0]))


@contextmanager
def torch_seeded(generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seeds torch's own CPU generator as ``generator`` was, for code that draws from it; restores it afterwards.

    What names no device is made on the CPU, so that its values are the same everywhere; what is drawn on ``device`` by
    name is seeded and restored likewise. Generators of other devices are left alone.
    """
    device, seed = torch.device(device), generator.initial_seed()
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def seeded_net(make_net: Callable[[], Net], seed: int, *key: int, device: torch.device | str = "cpu") -> Net:
    """Builds a network whose initial parameters depend on ``seed`` and ``key`` only; the global random state is
    unchanged."""
    if isinstance(make_net, nn.Module) or not callable(make_net):
        raise TypeError(f"make_net: expected a function that builds a network, got a {type(make_net).__name__}")
    with torch_seeded(seeded_generator(seed, *key), device):
        return make_net().to(device)
