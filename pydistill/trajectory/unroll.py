r"""The differentiable unroll: T steps of SGD on synthetic images, and the gradient of any loss of where they lead.

Inner loop, with g_k the gradient of the mean cross entropy of batch k (times ``loss_scale``) at theta_k:

    v_{k+1} = momentum v_k + g_k + weight_decay theta_k,      theta_{k+1} = theta_k - lr v_{k+1}

Given lambda_T = dL/dtheta_T, the reverse sweep from k = T - 1 down to 0 needs theta_k alone, not the steps' graphs:

    w        <- lambda + momentum w                           (the adjoint of v is nu = -lr w)
    dL/dlr   <- dL/dlr - w . (g_k + weight_decay theta_k)
    dL/dX    <- dL/dX + d(nu . g_k)/dX                        (labels likewise)
    lambda   <- lambda + H_k nu + weight_decay nu             (+ dL/dtheta_k where L looks at step k)

H_k nu = d(nu . g_k)/dtheta and the image term come from one step alone, run again from theta_k.
The result is the gradient that backpropagation through all steps computes; memory grows by one vector per step.
The trajectory-matching papers (Cazenavette et al., CVPR 2022) backpropagate through everything; Deng & Russakovsky
(NeurIPS 2022) replay steps as is done here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pydistill.ops.convnet_step import LabelKind, Precision
from pydistill.trajectory.inner_loop import InnerLoop, Step, check_lr, largest_of
from pydistill.trajectory.students import ConvNetStudents, Engine

Mode = Literal["exact", "first_order", "full"]


def unroll(
    net: nn.Module,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    *,
    steps: int,
    batch_size: int | None = None,
    batches: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    augment: Callable[..., Tensor] | None = None,
    label_kind: LabelKind = "hard",
    loss_scale: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    at: Sequence[int] | None = None,
    mode: Mode = "exact",
    output: int | None = None,
    store: Literal["device", "host"] = "device",
    store_every: int = 1,
    check_finite: bool = True,
    engine: Engine = "auto",
    precision: Precision = "fp32",
    memory: Literal["auto"] | int = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Train a student for ``steps`` steps of SGD from theta0; the result is differentiable.

    Equivalent to this loop, with or without its memory (``mode``)::

        v = 0
        for k in range(steps):
            loss = loss_scale * F.cross_entropy(net(augment(images[batches[k]]); theta), labels[batches[k]])
            v = momentum * v + torch.autograd.grad(loss, theta, create_graph=True)[0] + weight_decay * theta
            theta = theta - lr * v

    ``.backward()`` from any loss of the result fills the gradients of ``theta0``, ``images``, ``labels`` (when
    floating) and ``lr``, each where it requires one.

    Args:
        net: the student; its parameters are not used, only its structure. In training mode its buffers (BatchNorm's
            running statistics) change as in the loop above, and not once more in the backward pass. A
            `pydistill.compat.ReparamModule` is taken for the network inside it.
        theta0: ``[P]`` starting parameters, in ``net.parameters()`` order, or ``[E, P]``: E students at once, the same
            as E calls one after the other.
        images: ``[N, C, H, W]`` synthetic images, dtype and device of theta0; with E students, all train on them, or
            each on its own of ``[E, N, C, H, W]``.
        labels: int64 ``[N]`` for label_kind "hard"; floating ``[N, K]`` for "logits" (a softmax is taken) and "probs";
            or a student's own, with ``[E]`` in front.
        lr: the learning rate, a tensor of one element or a number, or ``[E]``.
        steps: how many steps, T >= 1.
        batch_size: images per step: consecutive chunks of a permutation drawn from ``generator``, a new one when it is
            used up (the last chunk may be smaller), its own for every student. None: all images in every step.
        batches: the steps' batches explicitly, T int64 index vectors, each ``[B]`` or ``[E, B]``; instead of
            batch_size.
        generator: source of the permutations and of ``augment.draw``; torch's default when None.
        augment: applied to each batch, differentiable in the images. Either an object with
            ``draw(shape, generator) -> record`` and ``__call__(images, record)``, or a plain function of the images
            that draws from torch's global generators; both are replayed bitwise in the backward pass. Other sources
            of randomness (numpy's, Python's) are not. Where m times as many images come out, one copy of the batch
            after the other, the labels are repeated. `pydistill.augment.DiffAugment` is one.
        label_kind: what ``labels`` holds.
        loss_scale: factor on every step's loss.
        momentum, weight_decay: as in ``torch.optim.SGD`` (no dampening, no Nesterov).
        at: step numbers in 1..T: return the parameters after those steps, each differentiable, instead of the last.
        mode: "exact": the gradient by the reverse sweep above, memory of one step and one vector per step.
            "full": plain autograd through all steps, the same gradient at T times the memory; differentiable again.
            "first_order": the estimator of TESLA (Cui et al., ICML 2023), **biased**: it takes every theta_k for a
            constant, dL/dX_k = -lr (d g_k / d X_k)^T dL/dtheta_T, dropping the product of (I - lr H_j) over the later
            steps, as it does in dL/dlr. Equal to the exact gradient for T = 1 only.
        output: which element to take where ``net`` returns a tuple.
        store: where "exact" keeps the vectors: on theta0's device or on the "host".
        store_every: keep every k-th vector (and velocity) only; the others are recomputed in the backward pass.
        check_finite: raise if parameters become non-finite; False returns them as they are.
        engine: "student": the hand-written step of `pydistill.ops.convnet_gradient` and `convnet_tangent`, for ConvNets
            as the method repositories define them (`pydistill.trajectory.convnet_shape` says which). "generic":
            autograd, for any module. "auto": the first where it can run; the logger "pydistill" says at debug level
            which it was, and why.
        precision: "bf16": convolutions with factors rounded to bfloat16 (the generic engine: under autocast); sums,
            statistics, parameters and updates stay in float32. "fp32": the dtype of theta0 throughout.
        memory: bytes that the student engine may work in. With room, some steps' activations are kept for the backward
            pass, which else computes them again: the same bits, up to a fifth faster. "auto": of 4 steps in at
            most 256 MiB, or of as many as go into 16 MiB, beyond the stored parameters and one step's working memory.

    Returns:
        theta_T, shaped as theta0, or a tuple of such for ``at``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it should be.
        FloatingPointError: non-finite parameters; the message names the step.
        RuntimeError: the gradient of "exact" or "first_order" was itself to be differentiated.
    """
    loop = InnerLoop(
        net,
        theta0,
        images,
        labels,
        steps=steps,
        batch_size=batch_size,
        batches=batches,
        generator=generator,
        augment=augment,
        label_kind=label_kind,
        loss_scale=loss_scale,
        momentum=momentum,
        weight_decay=weight_decay,
        output=output,
        check_finite=check_finite,
        engine=engine,
        precision=precision,
        memory=memory,
        mode=mode,
    )
    lr = check_lr(lr, theta0)
    wanted = (steps,) if at is None else _check_at(at, steps)
    if mode not in ("exact", "first_order", "full"):
        raise ValueError(f"mode: expected 'exact', 'first_order' or 'full', got {mode!r}")
    if store not in ("device", "host"):
        raise ValueError(f"store: expected 'device' or 'host', got {store!r}")
    if store_every < 1:
        raise ValueError(f"store_every: expected at least 1, got {store_every}")
    students = theta0 if theta0.dim() == 2 else theta0[None]  # [E, P]
    if mode == "full":
        thetas = loop.run_full(students, images, labels, lr, wanted)
    else:
        options = _SweepOptions(wanted, mode == "exact", "cpu" if store == "host" else None, store_every)
        thetas = _Unroll.apply(loop, options, students, images, labels, lr)
    if theta0.dim() == 1:
        thetas = [theta[0] for theta in thetas]
    return thetas[0] if at is None else tuple(thetas)


@dataclass(frozen=True)
class _SweepOptions:
    wanted: tuple[int, ...]  # step numbers whose parameters are returned
    exact: bool  # False: TESLA's first-order estimator
    device: str | None  # where parameters are kept; None: where theta0 is
    every: int  # keep every k-th


class _Trajectory:
    """The parameters of every step, of which some are kept and the others recomputed a stretch at a time."""

    def __init__(self, loop: InnerLoop, options: _SweepOptions, theta0: Tensor, steps: int):
        self.loop, self.every = loop, options.every
        # velocities matter only where a stretch is recomputed under momentum
        self.keeps_velocity = bool(loop.momentum) and options.every > 1
        rows = (steps - 1) // options.every + 1
        # allocated at once: small blocks between the steps' large ones would fragment the heap
        self.theta = theta0.new_empty((rows, *theta0.shape), device=options.device)
        self.velocity = self.theta.new_empty(self.theta.shape) if self.keeps_velocity else None

    @property
    def nbytes(self) -> int:
        return self.theta.nbytes * (2 if self.keeps_velocity else 1)

    def keep(self, k: int, theta: Tensor, velocity: Tensor | None) -> None:
        if k % self.every == 0:
            self.theta[k // self.every] = theta
            if self.keeps_velocity and velocity is not None:
                self.velocity[k // self.every] = velocity

    def stretches(
        self, steps: list[Step], images: Tensor, labels: Tensor, lr: Tensor
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """From the last to the first: (k, [theta_k, theta_{k+1}, ...]) between two kept vectors."""
        device = images.device
        for row in range(len(self.theta) - 1, -1, -1):
            first = row * self.every
            theta = self.theta[row].to(device)
            velocity = self.velocity[row].to(device) if self.keeps_velocity and first else None
            thetas = [theta]
            for k in range(first, min(first + self.every, len(steps)) - 1):
                grad = self.loop.gradient(theta, steps[k], images, labels, replay=True, keep=False)
                theta, velocity = self.loop.update(theta, grad, velocity, lr)
                thetas.append(theta)
            yield first, thetas


class _Unroll(torch.autograd.Function):
    """The forward sweep keeping parameters, the reverse sweep replaying one step at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        loop: InnerLoop,
        options: _SweepOptions,
        theta0: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        T = max(options.wanted)
        steps = loop.steps[:T]
        differentiable = any(ctx.needs_input_grad)
        trajectory = _Trajectory(loop, options, theta0, T) if differentiable else None
        if isinstance(loop.students, ConvNetStudents):
            largest = max(images.shape[-4] if step.index is None else step.index.shape[-1] for step in steps)
            stored = trajectory.nbytes if trajectory is not None else 0
            loop.students.plan(loop.memory, T, len(theta0), largest, theta0, stored)
        all_kept = trajectory is not None and options.every == 1  # so that they can be looked at together
        magnitudes, out = [], {}
        theta, velocity = theta0.detach(), None
        for k, step in enumerate(steps):
            if trajectory is not None:
                trajectory.keep(k, theta, velocity)
            with loop.recording(step) if differentiable else contextlib.nullcontext():
                grad = loop.gradient(theta, step, images, labels, replay=False, keep=differentiable)
            theta, velocity = loop.update(theta, grad, velocity, lr)
            if not all_kept:
                magnitudes.append(largest_of(theta[None])[0])
            if k + 1 in options.wanted:
                out[k + 1] = theta
        if all_kept:
            magnitudes = [*largest_of(trajectory.theta[1:]).to(theta.device), largest_of(theta[None])[0]]
        loop.raise_if_not_finite(magnitudes)
        ctx.loop, ctx.options, ctx.steps, ctx.trajectory = loop, options, steps, trajectory
        ctx.save_for_backward(images, labels, lr)  # for their version check: replays must see the same values
        return tuple(out[t].clone() for t in options.wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("unroll: this gradient cannot be differentiated again; mode='full' can")
        loop, options = ctx.loop, ctx.options
        loop.raise_if_changed()
        images, labels, lr = ctx.saved_tensors
        _, _, needs_theta0, needs_images, needs_labels, needs_lr = ctx.needs_input_grad
        incoming: dict[int, Tensor] = {}
        for t, grad in zip(options.wanted, grads, strict=True):
            incoming[t] = incoming[t] + grad if t in incoming else grad

        d_images = torch.zeros_like(images) if needs_images else None
        d_labels = torch.zeros_like(labels) if needs_labels else None
        d_lr = torch.zeros_like(lr) if needs_lr else None
        adjoint = torch.zeros_like(grads[0])  # lambda [E, P]
        w = torch.zeros_like(adjoint)
        scale = -lr.flatten().expand(len(adjoint))  # nu = scale w

        for first, thetas in ctx.trajectory.stretches(ctx.steps, images, labels, lr):
            for k in range(first + len(thetas) - 1, first - 1, -1):
                theta, step = thetas[k - first], ctx.steps[k]
                if k + 1 in incoming:
                    adjoint = adjoint + incoming[k + 1]
                w = adjoint + loop.momentum * w if loop.momentum else adjoint
                found = loop.adjoint(
                    theta,
                    w,
                    scale,
                    step,
                    images,
                    labels,
                    curvature=options.exact,
                    needs_images=needs_images,
                    needs_labels=needs_labels,
                )
                if d_lr is not None:
                    slope = found.slope
                    if loop.weight_decay:
                        slope = slope + loop.weight_decay * (w * theta).sum(1)
                    d_lr -= slope.view_as(d_lr) if d_lr.numel() == len(slope) else slope.sum().view_as(d_lr)
                loop.accumulate(d_images, step, found.images, images.dim() == 5)
                loop.accumulate(d_labels, step, found.labels, loop.own_labels)
                if options.exact:
                    adjoint = adjoint + found.curvature
                    if loop.weight_decay:
                        adjoint = adjoint + loop.weight_decay * scale[:, None] * w
        return None, None, adjoint if needs_theta0 else None, d_images, d_labels, d_lr


def _check_at(at: Sequence[int], steps: int) -> tuple[int, ...]:
    wanted = tuple(at)
    if not wanted:
        raise ValueError("at: expected at least one step number, got none")
    for t in wanted:
        if not isinstance(t, int) or not 1 <= t <= steps:
            raise ValueError(f"at: expected step numbers in 1..{steps}, got {t!r}")
    return wanted
