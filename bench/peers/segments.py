"""Segments of expert trajectories from files: the problem, and what the repositories do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain_convnet import PlainConvNet


class Segment(NamedTuple):
    theta0: Tensor  # [P]
    target: Tensor  # [P]


Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Experts:
    """Random trajectories, and the positions of segments in them; `folder` is removed with the object."""

    net: PlainConvNet
    experts: int
    epochs: int
    length: int
    opens: bool  # whether to time only the opening of a file, which then has no data
    folder: tempfile.TemporaryDirectory[str]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def row(self, expert: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(expert * (self.epochs + 1) + epoch)
        return torch.randn(self.numel, generator=generator)

    def truth(self, expert: int, epoch: int) -> Segment:
        return Segment(self.row(expert, epoch), self.row(expert, epoch + self.length))

    def places(self) -> Iterator[tuple[int, int]]:
        """(expert, epoch), endlessly."""
        generator = torch.Generator().manual_seed(0)
        while True:
            yield tuple(
                int(torch.randint(size, (), generator=generator))
                for size in (self.experts, self.epochs + 1 - self.length)
            )

    @property
    def buffer(self) -> Path:
        """All experts in a file as written by the repositories' buffer.py."""
        path = Path(self.folder.name) / "replay_buffer_0.pt"
        if not path.exists():
            sizes = [p.numel() for p in self.net.parameters()]
            torch.save(
                [
                    [
                        [
                            part.view(p.shape).clone()
                            for part, p in zip(row.split(sizes), self.net.parameters(), strict=True)
                        ]
                        for row in (self.row(expert, epoch) for epoch in range(self.epochs + 1))
                    ]
                    for expert in range(self.experts)
                ],
                path,
            )
        return path


def make_experts(config: dict[str, Any], opens: bool = False) -> Experts:
    shape = (config[name] for name in ("channels", "classes", "width", "depth", "image_size"))
    sizes = config["opened"] if opens else config["read"]
    return Experts(PlainConvNet(*shape), *sizes, config["length"], opens, tempfile.TemporaryDirectory())


def prepare_load(problem: Experts, **options: Any) -> Thunk:
    """The repositories' distill.py, which does this for every tenth segment, as a file has ten experts."""
    places, path = problem.places(), problem.buffer

    def run() -> Segment:
        expert, epoch = next(places)
        trajectory = torch.load(path, weights_only=True, **options)[expert]
        ends = (trajectory[epoch], trajectory[epoch + problem.length])
        return Segment(*(torch.cat([p.reshape(-1) for p in snapshot]) for snapshot in ends))

    return run
