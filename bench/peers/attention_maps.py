"""The divergence between two softmax attention maps in plain torch: both maps in memory, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, int, int, int]  # B, H, N, d
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Diverged(NamedTuple):
    loss: Tensor
    grad_q: Tensor
    grad_k: Tensor


Thunk = Callable[[], Diverged]


@dataclass(frozen=True)
class Maps:
    q_s: Tensor  # [B, H, N, d], like the next three
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor
    shapes: tuple[Shape, ...] = ()  # those that a memory measurement goes through

    def double(self) -> Maps:
        return replace(self, **{name: getattr(self, name).double() for name in ("q_s", "k_s", "q_t", "k_t")})

    def with_steps(self, tokens: int) -> Maps:
        """The problem of the shape with this many tokens, or one with a single sample."""
        _, H, _, d = self.q_s.shape
        return make_maps(next((shape for shape in self.shapes if shape[2] == tokens), (1, H, tokens, d)), self.shapes)


def make_maps(shape: Shape, shapes: tuple[Shape, ...] = (), dtype: torch.dtype = torch.float32) -> Maps:
    """A student whose queries and keys are a noisy copy of the teacher's."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4)]
    return Maps(draws[0] + 0.5 * draws[2], draws[1] + 0.5 * draws[3], draws[0], draws[1], shapes)


def unip(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """As in UNIP's training: a layer's map for its output and its scores again for the loss, on both sides."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        return (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5

    with torch.no_grad():
        teacher = scores(q_t, k_t)
    log_s, log_t = scores(q_s, k_s).log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()


def once(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """The same loss with each product computed once."""
    log_s, log_t = (((q @ k.mT) * q.shape[-1] ** -0.5).log_softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()


def prepare(problem: Maps, divergence: Divergence = unip) -> Thunk:
    """The loss and its gradients in the student's queries and keys."""

    def run() -> Diverged:
        leaves = [x.detach().requires_grad_() for x in (problem.q_s, problem.k_s)]
        loss = divergence(*leaves, problem.q_t, problem.k_t)
        return Diverged(loss.detach(), *torch.autograd.grad(loss, leaves))

    return run


def prepare_compiled(problem: Maps, divergence: Divergence = unip) -> Thunk:
    torch._dynamo.config.recompile_limit = 64  # torch counts compilations by line of source
    return prepare(problem, torch.compile(partial(divergence), fullgraph=True, dynamic=False))
