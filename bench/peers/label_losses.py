"""Post-training's losses in plain torch: against a teacher's logits, and against the ten stored classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Solved(NamedTuple):
    loss: Tensor  # []
    d_student: Tensor


@dataclass(frozen=True)
class Logits:
    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C]
    T: float
    k: int

    def __post_init__(self) -> None:
        values, indices = (self.teacher / self.T).softmax(1).topk(self.k)
        object.__setattr__(self, "values", values)  # [N, k]
        object.__setattr__(self, "indices", indices)  # [N, k]

    def double(self) -> Logits:
        """With the same stored values."""
        wide = Logits(self.student.double(), self.teacher.double(), self.T, self.k)
        object.__setattr__(wide, "values", self.values.double())
        object.__setattr__(wide, "indices", self.indices)
        return wide


def make_logits(config: dict[str, Any], T: float, dtype: torch.dtype = torch.float32) -> Logits:
    """Both sides agree somewhat, as they do in training."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, config["rows"], config["classes"])
    student, teacher = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Logits(((student + teacher) / 2).to(dtype), teacher.to(dtype), T, config["k"])


Loss = Callable[[Tensor, Logits], Tensor]


def dense(student: Tensor, problem: Logits) -> Tensor:
    """As in SRe2L's train_FKD.py."""
    log_q, p = (student / problem.T).log_softmax(1), (problem.teacher / problem.T).softmax(1)
    return F.kl_div(log_q, p, reduction="batchmean")


def densified(student: Tensor, problem: Logits) -> Tensor:
    N, C = student.shape
    rest = (1 - problem.values.sum(1, keepdim=True)).clamp(min=0) / (C - problem.k)
    p = rest.expand(N, C).scatter(1, problem.indices, problem.values)
    return F.kl_div((student / problem.T).log_softmax(1), p, reduction="batchmean")


def _solve(loss: Loss, problem: Logits) -> Solved:
    student = problem.student.detach().requires_grad_()
    found = loss(student, problem)
    return Solved(found.detach(), torch.autograd.grad(found, student)[0])


def prepare(problem: Logits, loss: Loss) -> Callable[[], Solved]:
    return partial(_solve, loss, problem)


def prepare_compiled(problem: Logits, loss: Loss) -> Callable[[], Solved]:
    compiled = torch.compile(lambda student: loss(student, problem), fullgraph=True, dynamic=False)
    return partial(_solve, lambda student, _: compiled(student), problem)
