r"""The differentiable unroll: T steps on synthetic images, and the gradient of any loss of where they lead.

Inner loop, with g_k the gradient of the mean cross entropy of batch k (times ``loss_scale``) at theta_k:

    theta_{k+1}, moments_{k+1} = optimiser(theta_k, moments_k, q_k),      q_k = g_k + weight_decay theta_k

Given lambda_T = dL/dtheta_T, the reverse sweep from k = T - 1 down to 0 needs theta_k and the optimiser's moments, not
the steps' graphs. `pydistill.trajectory.optimizers` gives nu, the adjoint of q_k; for SGD with momentum it is -lr w,
with w <- lambda + momentum w, and for Adam it is derived there. Then

    dL/dX    <- dL/dX + d(nu . g_k)/dX                        (labels likewise)
    lambda   <- lambda + H_k nu + weight_decay nu             (+ dL/dtheta_k where L looks at step k)

H_k nu = d(nu . g_k)/dtheta and the image term come from one step alone, run again from theta_k.
The result is the gradient that backpropagation through all steps computes; memory grows by one vector per step (by
three with Adam).
The trajectory-matching papers (Cazenavette et al., CVPR 2022) backpropagate through everything; Deng & Russakovsky
(NeurIPS 2022) replay steps as is done here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from pydistill._arguments import check_choice, check_whole
from pydistill.ops.convnet_step import LabelKind, Precision
from pydistill.trajectory.arguments import check_lr
from pydistill.trajectory.compiled import CompiledStudents
from pydistill.trajectory.inner_loop import InnerLoop, Step, largest_of
from pydistill.trajectory.memory import Memory
from pydistill.trajectory.optimizers import Adam, State
from pydistill.trajectory.step import saved_tensors
from pydistill.trajectory.students import ConvNetStudents, Engine

Mode = Literal["exact", "first_order", "full"]


@overload
def unroll(
    net: nn.Module,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    *,
    steps: int,
    batch_size: int | None = ...,
    batches: Sequence[Tensor] | None = ...,
    generator: torch.Generator | Sequence[torch.Generator] | None = ...,
    augment: Callable[..., Tensor] | None = ...,
    label_kind: LabelKind = ...,
    loss_scale: float = ...,
    optimizer: Literal["sgd"] | Adam = ...,
    momentum: float = ...,
    weight_decay: float = ...,
    warmup: int = ...,
    at: None = ...,
    mode: Mode = ...,
    output: int | None = ...,
    store: Literal["device", "host"] = ...,
    store_every: int = ...,
    check_finite: bool | None = ...,
    engine: Engine = ...,
    precision: Precision = ...,
    memory: Memory = ...,
) -> Tensor: ...
@overload
def unroll(
    net: nn.Module,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    *,
    steps: int,
    batch_size: int | None = ...,
    batches: Sequence[Tensor] | None = ...,
    generator: torch.Generator | Sequence[torch.Generator] | None = ...,
    augment: Callable[..., Tensor] | None = ...,
    label_kind: LabelKind = ...,
    loss_scale: float = ...,
    optimizer: Literal["sgd"] | Adam = ...,
    momentum: float = ...,
    weight_decay: float = ...,
    warmup: int = ...,
    at: Sequence[int],
    mode: Mode = ...,
    output: int | None = ...,
    store: Literal["device", "host"] = ...,
    store_every: int = ...,
    check_finite: bool | None = ...,
    engine: Engine = ...,
    precision: Precision = ...,
    memory: Memory = ...,
) -> tuple[Tensor, ...]: ...
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
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    augment: Callable[..., Tensor] | None = None,
    label_kind: LabelKind = "hard",
    loss_scale: float = 1.0,
    optimizer: Literal["sgd"] | Adam = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    warmup: int = 0,
    at: Sequence[int] | None = None,
    mode: Mode = "exact",
    output: int | None = None,
    store: Literal["device", "host"] = "device",
    store_every: int = 1,
    check_finite: bool | None = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    memory: Memory = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Train a student for ``steps`` steps of SGD or Adam from theta0; the result is differentiable.

    Equivalent to this loop, with or without its memory (``mode``)::

        v = 0
        for k in range(steps):
            loss = loss_scale * F.cross_entropy(net(augment(images[batches[k]]); theta), labels[batches[k]])
            v = momentum * v + torch.autograd.grad(loss, theta, create_graph=True)[0] + weight_decay * theta
            theta = theta - lr * v
            if k + 1 == warmup:
                theta, v = theta.detach(), v.detach()

    ``.backward()`` from any loss of the result fills the gradients of ``theta0``, ``images``, ``labels`` (when
    floating) and ``lr``, each where it requires one.

    Args:
        net: the student; only its structure is used, not its parameters. In training mode its buffers (BatchNorm's
            running statistics) change as in the loop above, but not again in the backward pass. Wrappers, the
            repositories' ReparamModule among them, stand for the network inside: see `pydistill.trajectory.FlatModule`.
            As with ``torch.optim.SGD``, parameters that do not require a gradient (unless none does) and those that no
            loss uses keep their values in theta, without decay or momentum; their gradient is zero.
        theta0: ``[P]`` starting parameters, in ``net.parameters()`` order, or ``[E, P]``: E students at once, the same
            as E calls one after the other.
        images: ``[N, C, H, W]`` synthetic images, dtype and device of theta0; with E students, all train on them, or
            each on its own of ``[E, N, C, H, W]``.
        labels: int64 ``[N]`` for label_kind "hard"; floating ``[N, K]`` for "logits" (a softmax is taken) and "probs";
            or a student's own, with ``[E]`` in front. On a GPU class numbers are checked once for a tensor, and again
            after changes that torch counts (not those by ``labels.data``).
        lr: the learning rate, a tensor of one element or a number, or ``[E]``.
        steps: how many steps, T >= 1.
        batch_size: images per step: consecutive chunks of a permutation drawn from ``generator``, a new one when it is
            used up (the last chunk may be smaller), its own for every student. None: all images in every step.
        batches: the steps' batches explicitly, T int64 index vectors, each ``[B]`` or ``[E, B]``; instead of
            batch_size. They are copied; those on the CPU are checked without waiting for the images' device.
        generator: source of the permutations and of ``augment.draw``; torch's default when None. Or E of them, one
            per student.
        augment: applied to each batch, differentiable in the images. Either an object with
            ``draw(shape, generator) -> record`` and ``__call__(images, record)``, or a plain function of the images
            that draws from torch's global generators; both are replayed bitwise in the backward pass. Other sources
            of randomness (numpy's, Python's) are not. If m times as many images come out, one copy of the batch
            after the other, the labels are repeated. Images may come out in another size (MTT's texture mode crops a
            canvas), which then decides which engine runs. `pydistill.augment.DiffAugment` is one.
        label_kind: what ``labels`` holds.
        loss_scale: factor on every step's loss.
        optimizer: "sgd", or `pydistill.trajectory.Adam` with its betas and eps.
        momentum, weight_decay: as in ``torch.optim.SGD`` (no dampening, no Nesterov). The decay is coupled with Adam
            too, as in ``torch.optim.Adam``; momentum is SGD's alone.
        warmup: how many of the steps come before the window that is differentiated, fewer than T: parameters and
            moments after them are constants, and the gradient of theta0 is zero. RaT-BPTT (Feng et al., ICLR 2024)
            draws it anew each time. These steps keep nothing.
        at: step numbers in warmup + 1..T: return the parameters after those steps, each differentiable, instead of the
            last.
        mode: "exact": the gradient by the reverse sweep above, memory of one step and one vector per step.
            "full": plain autograd through all steps, the same gradient at T times the memory; differentiable again.
            "first_order": the estimator of TESLA (Cui et al., ICML 2023), **biased**: it treats every theta_k as a
            constant, dL/dX_k = -lr (d g_k / d X_k)^T dL/dtheta_T, dropping the product of (I - lr H_j) over the later
            steps, in dL/dlr too; moments are differentiated. Equal to the exact gradient for T = 1 only.
        output: which element to take where ``net`` returns a tuple; the student engine computes no other.
        store: where "exact" keeps the vectors: on theta0's device or on the "host".
        store_every: keep every k-th vector (and moments) only; the others are recomputed in the backward pass.
        check_finite: raise if parameters become non-finite; False returns them as they are. None: raise on the CPU
            alone; on a GPU the check is the one thing that the host would wait for.
        engine: "student": the hand-written step of `pydistill.ops.convnet_gradient` and `convnet_tangent`, for ConvNets
            as the method repositories define them (`pydistill.trajectory.convnet_shape` says which). "generic":
            autograd, for any module. "compiled": for any module that can be traced (nothing at random, no hooks, no
            branches on values), its step and the step's derivative, forward over reverse, as graphs under
            ``torch.compile``. A graph serves all nets of one structure and all batches of one shape; the first call
            compiles it, minutes for a ResNet-18, and compares it with autograd. "auto": "student" where it can run,
            else "generic": it never compiles unasked. The logger "pydistill" says at debug level which it was, and
            why.
        precision: "ieee" (formerly "fp32"): the dtype of theta0 throughout. "tf32", on CUDA: factors of convolutions
            and matrix products are rounded to TF32; "tf32-conv" or "tf32-matmul": of these alone. "bf16": convolutions
            with factors rounded to bfloat16 (the generic engine: under autocast), and kept activations; sums,
            statistics, parameters and updates stay in float32. "auto": on CUDA what torch's switches ask for when
            the call is made (``torch.backends.cudnn.conv.fp32_precision`` and ``cuda.matmul``'s, or their older
            ``allow_tf32``), as in the loop above: "tf32-conv" unless they were changed. On the CPU the same as "ieee".
            The backward pass has the forward's. Plain autograd (mode "full") and the compiled engine follow the
            switches, and on CUDA refuse what they do not say.
        memory: bytes that the student or the generic engine may work in. With room, some steps are kept for the
            backward pass, which otherwise recomputes them, up to a fifth slower: the same bits but for "bf16", which
            keeps the student engine's activations in bfloat16 on the CPU. "auto": beyond the stored parameters and one
            step's working memory, 256 MiB of kept steps on the CPU, on CUDA a quarter of the memory that is free when
            the unroll begins; on the CPU the student engine leaves up to as much of each allocated for the next unroll.
            On CUDA it counts stored parameters and kept steps alone, and no precision changes a bit. Or a
            `pydistill.trajectory.KeptSteps`, so that several unrolls keep the same number of steps.
            The generic engine keeps its last steps' whole graphs, whose size it learns in the first step; it holds one
            step's graph in any case.

    Returns:
        theta_T, shaped as theta0, or a tuple of such for ``at``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it should be.
        FloatingPointError: non-finite parameters, as ``check_finite`` says; the message names the step.
        RuntimeError: the gradient of "exact" or "first_order" was itself to be differentiated; images, labels, lr, or
            the net's mode, hooks or modules changed before it was taken; with momentum, Adam or weight_decay, a
            parameter is used by the losses of some steps only.
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
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup=warmup,
        output=output,
        check_finite=check_finite,
        engine=engine,
        precision=precision,
        memory=memory,
        mode=mode,
    )
    lr = check_lr(lr, theta0)
    wanted = (steps,) if at is None else _check_at(at, warmup, steps)
    check_choice("mode", mode, ("exact", "first_order", "full"))
    check_choice("store", store, ("device", "host"))
    check_whole("store_every", store_every, 1)
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
    """The states before each step after the warm-up: some are kept, the others recomputed one stretch at a time."""

    def __init__(self, loop: InnerLoop, options: _SweepOptions, theta0: Tensor, steps: int):
        self.loop, self.every, self.steps, self.on = loop, options.every, steps, options.device
        rows = (steps - loop.warmup - 1) // options.every + 1
        needed = loop.optimizer.reversed_by_moments or options.every > 1  # a stretch begins with its moments
        shape = (rows, *theta0.shape)
        # Separate vectors between the steps' other blocks fragment the heap, so they are copied into one block; but
        # small ones are kept as they come where a step is so short that the copy would show.
        engine = isinstance(loop.students, ConvNetStudents)
        self.as_they_come = engine and theta0.nbytes <= 1 << 17 and options.every == 1 and not options.device
        self.theta: Tensor | list[Tensor] = []
        if not self.as_they_come:
            self.theta = self._empty(theta0, shape)
        num_moments = loop.optimizer.num_moments * needed
        self.moments = [self._empty(theta0, shape) for _ in range(num_moments)]
        self.nbytes = (1 + num_moments) * rows * theta0.nbytes
        self.first_moments: tuple[Tensor, ...] = ()  # after the warm-up
        self.last_moments: tuple[Tensor, ...] = ()

    def _empty(self, theta0: Tensor, shape: Sequence[int]) -> Tensor:
        # pinned, so that the host waits for no copy
        return theta0.new_empty(shape, device=self.on, pin_memory=self.on == "cpu" and theta0.is_cuda)

    def keep(self, k: int, state: State) -> None:
        row, beside = divmod(k - self.loop.warmup, self.every)
        if k == self.loop.warmup:
            self.first_moments = state.moments
        if isinstance(self.theta, list):
            self.theta.append(state.theta if k else state.theta.clone())  # the first is the caller's
        elif beside == 0:
            self.theta[row].copy_(state.theta, non_blocking=True)
        if beside == 0:
            for kept, moment in zip(self.moments, state.moments, strict=False):  # none before the first step
                kept[row].copy_(moment, non_blocking=True)

    def stretches(
        self, steps: list[Step], images: Tensor, labels: Tensor, lr: Tensor
    ) -> Iterator[tuple[int, list[State]]]:
        """From the last to the first: (k, [the state before step k, before step k + 1, ...]) between two kept ones."""
        device = images.device
        for row in range(len(self.theta) - 1, -1, -1):
            first = self.loop.warmup + row * self.every
            moments = tuple(kept[row].to(device, non_blocking=True) for kept in self.moments) if first else ()
            states = [State(self.theta[row].to(device, non_blocking=True), moments)]
            for k in range(first, min(first + self.every, self.steps) - 1):
                grad = self.loop.gradient(states[-1].theta, steps[k], images, labels, replay=True, keep=False)
                states.append(self.loop.update(k, states[-1], grad, lr))
            yield first, states


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
            largest *= getattr(loop.augment, "copies", 1)
            stored = trajectory.nbytes if trajectory is not None else 0
            loop.students.plan(loop.memory, T, len(theta0), largest, theta0, stored, loop.warmup)
        elif trajectory is not None and not isinstance(loop.students, CompiledStudents):
            needs = dict(zip(("images", "labels"), ctx.needs_input_grad[3:5], strict=True))
            loop.students.plan(loop.memory, T, trajectory.nbytes, theta0.device, loop.warmup, **needs)
        all_kept = trajectory is not None and options.every == 1
        magnitudes, out = [], {}
        state = State(theta0.detach(), ())
        for k, step in enumerate(steps):
            recorded = differentiable and k >= loop.warmup
            if trajectory is not None and recorded:
                trajectory.keep(k, state)
            with loop.recording(step) if recorded else contextlib.nullcontext():
                grad = loop.gradient(state.theta, step, images, labels, replay=False, keep=recorded)
            state = loop.update(k, state, grad, lr)
            if loop.check_finite and not (all_kept and recorded):
                magnitudes.append(largest_of(state.theta[None])[0])
            if k + 1 in options.wanted:
                out[k + 1] = state.theta
        if loop.check_finite and not state.theta.isfinite().all():  # a non-finite element stays so
            if trajectory is not None and all_kept:
                thetas = (*trajectory.theta[1:], state.theta)
                magnitudes += [largest_of(theta[None])[0].to(theta0.device) for theta in thetas]
            loop.raise_if_not_finite(magnitudes)
        if trajectory is not None:
            trajectory.last_moments = state.moments if loop.optimizer.reversed_by_moments else ()
        ctx.loop, ctx.options, ctx.steps, ctx.trajectory = loop, options, steps, trajectory
        ctx.save_for_backward(images, labels, lr)  # for their version check: replays must see the same values
        return tuple(out[t].clone() for t in options.wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("unroll: this gradient cannot be differentiated again; mode='full' can")
        ctx.loop.raise_if_changed()
        with ctx.loop.as_in_forward():
            return _Unroll._sweep(ctx, grads)

    @staticmethod
    def _sweep(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        loop, options = ctx.loop, ctx.options
        images, labels, lr = saved_tensors(ctx, "images, labels, lr")
        _, _, needs_theta0, needs_images, needs_labels, needs_lr = ctx.needs_input_grad
        incoming: dict[int, Tensor] = {}
        for t, grad in zip(options.wanted, grads, strict=True):
            incoming[t] = incoming[t] + grad if t in incoming else grad

        d_images = torch.zeros_like(images) if needs_images else None
        d_labels = torch.zeros_like(labels) if needs_labels else None
        d_lr = torch.zeros_like(lr) if needs_lr else None
        adjoint = torch.zeros_like(grads[0])  # lambda [E, P]
        sweep = loop.optimizer.sweep(lr.view(-1, 1).expand(len(adjoint), 1))
        moments_after = ctx.trajectory.last_moments

        for first, states in ctx.trajectory.stretches(ctx.steps, images, labels, lr):
            for k in range(first + len(states) - 1, first - 1, -1):
                before, step = states[k - first], ctx.steps[k]
                if k + 1 in incoming:
                    adjoint = adjoint + incoming[k + 1]
                # nu = scale direction
                direction, scale, lr_part = sweep.pull(k, adjoint, before.moments, moments_after)
                if loop.trained is not None:
                    direction = direction * loop.trained
                found = loop.adjoint(
                    before.theta,
                    direction,
                    scale,
                    step,
                    images,
                    labels,
                    curvature=options.exact,
                    needs_images=needs_images,
                    needs_labels=needs_labels,
                )
                if d_lr is not None:
                    if lr_part is None:
                        lr_part = -found.slope
                        if loop.weight_decay:
                            lr_part = lr_part - (direction * loop.decay(before.theta)).sum(1)
                    d_lr += _per_rate(lr_part, d_lr)
                loop.accumulate(d_images, step, found.images, images.dim() == 5)
                loop.accumulate(d_labels, step, found.labels, loop.own_labels)
                if options.exact:
                    adjoint = adjoint + found.curvature
                    if loop.weight_decay:
                        adjoint = adjoint + scale[:, None] * loop.decay(direction)
                moments_after = before.moments
        if loop.warmup:
            if d_lr is not None and (lr_part := sweep.lr_of_start(ctx.trajectory.first_moments)) is not None:
                d_lr += _per_rate(lr_part, d_lr)
            adjoint = torch.zeros_like(adjoint)
        return None, None, adjoint if needs_theta0 else None, d_images, d_labels, d_lr


def _per_rate(each: Tensor, lr: Tensor) -> Tensor:
    """``each`` [E], one per student, summed where they share a rate, shaped as ``lr``."""
    return each.view_as(lr) if lr.numel() == len(each) else each.sum().view_as(lr)


def _check_at(at: Sequence[int], warmup: int, steps: int) -> tuple[int, ...]:
    if not isinstance(at, Iterable):
        raise TypeError(f"at: expected step numbers, got {at!r}")
    wanted = tuple(at)
    if not wanted:
        raise ValueError("at: expected at least one step number, got none")
    for t in wanted:
        if not isinstance(t, int) or not warmup < t <= steps:
            after = f", after the warmup of {warmup}" if warmup else ""
            raise ValueError(f"at: expected step numbers in {warmup + 1}..{steps}{after}, got {t!r}")
    return wanted
