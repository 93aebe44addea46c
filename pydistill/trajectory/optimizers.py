r"""The unroll's inner optimisers: their step and its reverse.

A step turns q_k = g_k + weight_decay theta_k into the next parameters and moments. The reverse, given lambda =
dL/dtheta_{k+1} and the adjoints of the moments, gives the adjoint of q_k; how that carries over to theta_k, the images
and the labels is the same for all of them (`pydistill.trajectory.unroll`), as q depends on those through g_k alone.

**SGD**: v_{k+1} = momentum v_k + q_k and theta_{k+1} = theta_k - lr v_{k+1}. With w the adjoint of v divided by -lr:

    w <- lambda + momentum w,      dL/dlr <- dL/dlr - w . q_k,      adjoint of q_k = -lr w

and, where the sweep ends at a velocity v_s that is not zero, dL/dlr <- dL/dlr - momentum w . v_s.

**Adam** (Kingma & Ba, ICLR 2015), with t = k + 1, c1 = 1 - beta1^t, c2 = 1 - beta2^t, all products elementwise:

    m' = beta1 m + (1 - beta1) q
    v' = beta2 v + (1 - beta2) q^2
    r  = sqrt(v' / c2),   u = m' / (c1 (r + eps)),   theta' = theta - lr u

Let mu and xi be the adjoints of m' and v' through the later steps, zero after the last. Theta' adds to them through
du/dm' = 1 / (c1 (r + eps)) and du/dv' = -u / (r + eps) dr/dv', where dr/dv' = 1 / (2 c2 r):

    dL/dlr <- dL/dlr - lambda . u
    M = mu - lr lambda / (c1 (r + eps))
    V = xi + lr lambda u / (2 c2 r (r + eps))
    adjoint of q = (1 - beta1) M + 2 (1 - beta2) q V
    mu <- beta1 M,   xi <- beta2 V

It needs q, m' and v' of every step. The moments are kept beside the parameters, and q = (m' - beta1 m) / (1 - beta1).

Where v' = 0, every gradient so far was zero (a dead unit, say), and autograd's dr/dv' is infinite: 0 * inf = NaN. Yet
u is differentiable in q there: in the first step it is q / (|q| + eps), whose derivative at zero is 1 / eps. As q tends
to zero m' / r stays bounded, so that q V tends to zero: V's second term is dropped at v' = 0, in all modes, which
leaves (1 - beta1) / (c1 eps) for du/dq. That is finite, but large: parameters whose gradient is only rounding (a
convolution's bias before an instance norm) have their noise amplified by lr / eps where L depends on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Students between two steps."""

    theta: Tensor  # [E, P]
    moments: tuple[Tensor, ...]  # what the optimiser remembers, [E, P] each; empty for zeros, before the first step


class Pulled(NamedTuple):
    """The reverse of a step: the adjoint of q is scale * direction."""

    direction: Tensor  # [E, P]
    scale: Tensor  # [E]
    lr: Tensor | None  # [E], the adjoint of lr; None: it is -q . direction


@dataclass(frozen=True)
class SGD:
    momentum: float = 0.0

    reversed_by_moments: ClassVar[bool] = False  # whether the reverse of a step needs them

    @property
    def num_moments(self) -> int:
        return 1 if self.momentum else 0

    def step(self, k: int, state: State, q: Tensor, lr: Tensor) -> State:
        """``lr`` [E, 1] or [1, 1]."""
        velocity = self.momentum * state.moments[0] + q if self.momentum and state.moments else q
        return State(torch.addcmul(state.theta, velocity, lr, value=-1), (velocity,) if self.momentum else ())

    def sweep(self, lr: Tensor) -> _SGDSweep:
        return _SGDSweep(self, lr)


class _SGDSweep:
    def __init__(self, optimizer: SGD, lr: Tensor):
        self.momentum, self.scale = optimizer.momentum, -lr[:, 0]
        self.w: Tensor | None = None

    def pull(self, k: int, adjoint: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> Pulled:
        self.w = adjoint + self.momentum * self.w if self.momentum and self.w is not None else adjoint
        return Pulled(self.w, self.scale, None)

    def lr_of_start(self, moments: tuple[Tensor, ...]) -> Tensor | None:
        """[E]: the last part of lr's adjoint, due to the ``moments`` that the first step began with."""
        return -self.momentum * torch.linalg.vecdot(self.w, moments[0]) if moments else None


@dataclass(frozen=True)
class Adam:
    """Adam as the students' optimiser, ``torch.optim.Adam(betas=(beta1, beta2), eps=eps)`` (Kingma & Ba, ICLR 2015).

    RaT-BPTT (Feng et al., ICLR 2024) trains its students this way.

    Attributes:
        beta1, beta2: in [0, 1).
        eps: positive.

    Raises:
        TypeError, ValueError: an attribute is not a number, or out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    num_moments: ClassVar[int] = 2
    reversed_by_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2), ("eps", self.eps)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: expected a positive finite number, got {self.eps}")

    def step(self, k: int, state: State, q: Tensor, lr: Tensor) -> State:
        """``lr`` [E, 1] or [1, 1]."""
        m, v = (1 - self.beta1) * q, (1 - self.beta2) * q.square()
        if state.moments:
            m, v = self.beta1 * state.moments[0] + m, self.beta2 * state.moments[1] + v
        c1, c2 = self._corrections(k)
        return State(state.theta - lr * (m / (c1 * (_sqrt(v / c2) + self.eps))), (m, v))

    def sweep(self, lr: Tensor) -> _AdamSweep:
        return _AdamSweep(self, lr)

    def _corrections(self, k: int) -> tuple[float, float]:
        return 1 - self.beta1 ** (k + 1), 1 - self.beta2 ** (k + 1)


class _AdamSweep:
    def __init__(self, optimizer: Adam, lr: Tensor):
        self.optimizer, self.lr = optimizer, lr
        self.mu: Tensor | float = 0.0
        self.xi: Tensor | float = 0.0

    def pull(self, k: int, adjoint: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> Pulled:
        """``before``, ``after``: the moments around step k."""
        beta1, beta2, eps = self.optimizer.beta1, self.optimizer.beta2, self.optimizer.eps
        c1, c2 = self.optimizer._corrections(k)
        m, v = after
        q = (m - beta1 * before[0] if before else m) / (1 - beta1)
        root = (v / c2).sqrt()
        denominator = root + eps
        u = m / (c1 * denominator)
        push = self.lr * adjoint
        big_m = self.mu - push / (c1 * denominator)
        through_root = push * (u / (2 * c2 * root * denominator))
        big_v = self.xi + through_root.masked_fill(root == 0, 0)
        self.mu, self.xi = beta1 * big_m, beta2 * big_v
        direction = (1 - beta1) * big_m + (2 * (1 - beta2)) * q * big_v
        return Pulled(direction, direction.new_ones(len(direction)), -torch.linalg.vecdot(adjoint, u))

    def lr_of_start(self, moments: tuple[Tensor, ...]) -> Tensor | None:
        return None


def _sqrt(v: Tensor) -> Tensor:
    """The square root; its derivative at zero counts as zero, for the reason given above."""
    if not v.requires_grad:
        return v.sqrt()
    zero = v == 0
    return v.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
