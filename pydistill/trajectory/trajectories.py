"""What trajectory matching needs of experts, and what can serve as experts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.store import ExpertStore

__all__ = ["Trajectories", "as_trajectories"]


class Trajectories(Protocol):
    """What trajectory matching needs of experts."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(experts, epochs + 1, P)``."""

    @property
    def completed(self) -> list[int]:
        """How many whole epochs each expert has."""

    def segment(self, expert: int, epoch: int, length: int) -> tuple[Tensor, Tensor]:
        """The parameters ``[P]`` at ``epoch`` and ``epoch + length``."""


class _InMemory:
    """A tensor ``[experts, epochs + 1, P]`` as `Trajectories`."""

    def __init__(self, trajectories: Tensor):
        self.trajectories = trajectories
        experts, states, numel = trajectories.shape
        self.shape = (experts, states, numel)
        self.completed = [self.shape[1] - 1] * self.shape[0]

    def segment(self, expert: int, epoch: int, length: int) -> tuple[Tensor, Tensor]:
        return self.trajectories[expert, epoch], self.trajectories[expert, epoch + length]


def as_trajectories(experts: Tensor | Trajectories, net: nn.Module, epochs: int) -> Trajectories:
    """Experts to draw segments from: a store, a tensor ``[experts, epochs + 1, P]``, or what behaves like a store.

    Raises:
        ValueError: they do not fit ``net``, or one of them has fewer than ``epochs`` whole epochs.
    """
    numel = FlatModule(net).numel
    if isinstance(experts, ExpertStore):
        experts.check_fits(net)
    if len(experts.shape) != 3 or experts.shape[2] != numel or not experts.shape[0]:
        raise ValueError(f"experts: expected [E, epochs + 1, {numel}] for this net, got {list(experts.shape)}")
    found: Trajectories = _InMemory(experts) if isinstance(experts, Tensor) else experts
    if (least := min(found.completed)) < epochs:
        raise ValueError(f"experts: expected at least {epochs} epochs of each, got {least}")
    return found
