"""Stored soft labels of a relabelling (FKD): the problem, and what SRe2L's code does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Trained(NamedTuple):
    losses: list[float]  # of the batches
    d_logits: Tensor  # [B, C], of the student, for the last of them


Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Labels:
    """An epoch of random teacher logits in files, and a student's; `folder` is removed with the object."""

    batch: int
    batches: int
    classes: int
    k: int
    T: float
    record_bytes: int
    workers: int
    dtype: torch.dtype  # of the student
    folder: tempfile.TemporaryDirectory[str]

    @property
    def images(self) -> int:
        return self.batch * self.batches

    def order(self, b: int) -> Tensor:
        """The images of a batch."""
        permuted = torch.randperm(self.images, generator=torch.Generator().manual_seed(0))
        return permuted[b * self.batch : (b + 1) * self.batch]

    def teacher(self, b: int) -> Tensor:
        """Logits ``[B, C]`` that favour a class, in float16 as they are saved."""
        generator = torch.Generator().manual_seed(1 + b)
        logits = 3 * torch.randn(self.batch, self.classes, generator=generator)
        logits[torch.arange(self.batch), torch.randint(self.classes, (self.batch,), generator=generator)] += 12
        return logits.half()

    @cached_property
    def student(self) -> Tensor:
        logits = 3 * torch.randn(self.batch, self.classes, generator=torch.Generator().manual_seed(0))
        return logits.to(self.dtype).requires_grad_()

    @cached_property
    def files(self) -> list[Path]:
        """One per batch, as relabel/generate_soft_label.py saves them with cutmix and fp16."""
        paths = [Path(self.folder.name) / "epoch_0" / f"batch_{b}.tar" for b in range(self.batches)]
        paths[0].parent.mkdir()
        for b, path in enumerate(paths):
            crops, flips = torch.rand(self.batch, 4), torch.rand(self.batch) < 0.5
            torch.save([crops, flips, torch.randperm(self.batch), 0.3, [20, 30, 100, 110], self.teacher(b)], path)
        return paths


def make_labels(config: dict[str, Any], **changes: Any) -> Labels:
    names = ("batch", "batches", "classes", "k", "T", "record_bytes", "workers")
    sizes = {name: {**config, **changes}[name] for name in names}
    return Labels(**sizes, dtype=changes.get("dtype", torch.float32), folder=tempfile.TemporaryDirectory())


def kl(student: Tensor, logits: Tensor, T: float) -> Tensor:
    """train/train_FKD.py."""
    return F.kl_div(F.log_softmax(student / T, 1), F.softmax(logits.float() / T, 1), reduction="batchmean")


def passes(loader: Any, loss: Callable[[Any], Tensor], student: Tensor) -> Trained:
    """The loss and its gradient, batch by batch; as in training, a gradient is freed before the next one is made."""
    losses, d_logits = [], student
    for labels in loader:
        del d_logits
        value = loss(labels)
        (d_logits,) = torch.autograd.grad(value, student)
        losses.append(value.detach())
    return Trained([float(each) for each in losses], d_logits)


class Files:
    """What the loader's worker reads: item b is the logits of batch b."""

    def __init__(self, paths: list[Path], **options: Any):
        self.paths, self.options = paths, options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, b: int) -> Tensor:
        return torch.load(self.paths[b], weights_only=True, **self.options)[5]


def prepare_load(problem: Labels, *, compiled: bool = False) -> Thunk:
    """An epoch of files, batch by batch; compiled: memory-mapped, and the loss through torch.compile."""
    files = Files(problem.files, **({"mmap": True} if compiled else {}))
    loader = DataLoader(files, batch_size=None, num_workers=problem.workers, persistent_workers=problem.workers > 0)
    function = torch.compile(kl) if compiled else kl
    student = problem.student
    return partial(passes, loader, lambda logits: function(student, logits, problem.T), student)


def saved_bytes(problem: Labels) -> Callable[[], float]:
    """Bytes per label in these files, with its record."""
    return lambda: sum(path.stat().st_size for path in problem.files) / problem.images


def densified(problem: Labels, batches: list[Tensor]) -> Trained:
    """The loss against distributions ``[B, C]``, in float64."""
    student = problem.student.detach().double().requires_grad_()

    def loss(target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student / problem.T, 1), target.double(), reduction="batchmean")

    return passes(batches, loss, student)
