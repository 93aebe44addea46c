"""Kernel ridge regression in plain torch: the loss and its gradients as in KRR-ST's repository, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAM = 1e-6


class Ridge(NamedTuple):
    loss: Tensor  # []
    d_features: Tensor  # of the synthetic images
    d_labels: Tensor  # of the synthetic images


@dataclass(frozen=True)
class Features:
    """Without the column of ones that every provider adds."""

    f_real: Tensor  # [B, d]
    f_syn: Tensor  # [m, d]
    y_syn: Tensor  # [m, q]
    y_real: Tensor  # [B, q]

    def with_steps(self, rows: int) -> Features:
        """The first synthetic images."""
        return Features(self.f_real, self.f_syn[:rows], self.y_syn[:rows], self.y_real)

    def double(self) -> Features:
        return Features(*(t.double() for t in (self.f_real, self.f_syn, self.y_syn, self.y_real)))


def make_features(config: dict[str, Any], rows: int | None = None, dtype: torch.dtype = torch.float32) -> Features:
    """Features after a ReLU; the targets are a linear function of them plus noise."""
    generator = torch.Generator().manual_seed(0)
    B, m, d, q = config["real"], rows or config["synthetic"], config["features"], config["targets"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    f_real, f_syn, linear = draw(B, d).relu(), draw(m, d).relu(), draw(d, q) / d**0.5
    y_real, y_syn = (f @ linear + 0.1 * draw(len(f), q) for f in (f_real, f_syn))
    return Features(*(t.to(dtype) for t in (f_real, f_syn, y_syn, y_real)))


def by_solve(f_real: Tensor, f_syn: Tensor, y_syn: Tensor, y_real: Tensor) -> Tensor:
    """Features with their ones, both kernels in full, a general solve."""
    f_real, f_syn = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (f_real, f_syn))
    k_ss, k_rs = f_syn @ f_syn.T, f_real @ f_syn.T
    ridge = LAM * k_ss.detach().trace() * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    return F.mse_loss(k_rs @ torch.linalg.solve(k_ss + ridge, y_syn), y_real)


def by_cholesky(f_real: Tensor, f_syn: Tensor, y_syn: Tensor, y_real: Tensor) -> Tensor:
    """What a skilled user would change: the symmetric solve, no column of ones."""
    k_ss, k_rs = f_syn @ f_syn.T + 1, f_real @ f_syn.T + 1
    ridge = LAM * k_ss.detach().trace() * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    return F.mse_loss(k_rs @ torch.cholesky_solve(y_syn, torch.linalg.cholesky(k_ss + ridge)), y_real)


def prepare(problem: Features, op: Callable[..., Tensor] = by_solve) -> Callable[[], Ridge]:
    """`op` and its gradients in the synthetic side."""

    def run() -> Ridge:
        f_syn, y_syn = (t.detach().requires_grad_() for t in (problem.f_syn, problem.y_syn))
        loss = op(problem.f_real, f_syn, y_syn, problem.y_real)
        return Ridge(loss.detach(), *torch.autograd.grad(loss, (f_syn, y_syn)))

    return run
