r"""The differentiable unroll: T steps of SGD on synthetic images, and the gradient of any loss of where they lead.

Inner loop, with g_k the gradient of the mean cross entropy of batch k (times ``loss_scale``) at theta_k:

    v_{k+1} = momentum v_k + g_k + weight_decay theta_k,      theta_{k+1} = theta_k - lr v_{k+1}

Given lambda_T = dL/dtheta_T, the reverse sweep from k = T - 1 down to 0 needs theta_k alone, not the steps' graphs:

    w        <- lambda + momentum w                           (the adjoint of v is nu = -lr w)
    dL/dlr   <- dL/dlr - w . (g_k + weight_decay theta_k)
    dL/dX    <- dL/dX + d(nu . g_k)/dX                        (labels likewise)
    lambda   <- lambda + H_k nu + weight_decay nu             (+ dL/dtheta_k where L looks at step k)

H_k nu = d(nu . g_k)/dtheta and the image term come from one backward pass over one step's graph, rebuilt from theta_k.
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
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.trajectory.flat import FlatModule

LabelKind = Literal["hard", "logits", "probs"]
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
        theta0: ``[P]`` starting parameters, in ``net.parameters()`` order.
        images: ``[N, C, H, W]`` synthetic images, dtype and device of theta0.
        labels: int64 ``[N]`` for label_kind "hard"; floating ``[N, K]`` for "logits" (a softmax is taken) and "probs".
        lr: the learning rate, a tensor of one element or a number.
        steps: how many steps, T >= 1.
        batch_size: images per step: consecutive chunks of a permutation drawn from ``generator``, a new one when it is
            used up (the last chunk may be smaller). None: all images in every step.
        batches: the steps' batches explicitly, T int64 index vectors; instead of batch_size.
        generator: source of the permutations and of ``augment.draw``; torch's default when None.
        augment: applied to each batch, differentiable in the images. Either an object with
            ``draw(shape, generator) -> record`` and ``__call__(images, record)``, or a plain function of the images
            that draws from torch's global generators; both are replayed bitwise in the backward pass. Other sources
            of randomness (numpy's, Python's) are not.
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

    Returns:
        theta_T ``[P]``, or a tuple of ``[P]`` for ``at``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it should be.
        FloatingPointError: non-finite parameters; the message names the step.
        RuntimeError: the gradient of "exact" or "first_order" was itself to be differentiated.
    """
    loop = _InnerLoop(
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
    )
    lr = _check_lr(lr, theta0)
    wanted = (steps,) if at is None else _check_at(at, steps)
    if mode not in ("exact", "first_order", "full"):
        raise ValueError(f"mode: expected 'exact', 'first_order' or 'full', got {mode!r}")
    if store not in ("device", "host"):
        raise ValueError(f"store: expected 'device' or 'host', got {store!r}")
    if store_every < 1:
        raise ValueError(f"store_every: expected at least 1, got {store_every}")
    if mode == "full":
        thetas = loop.run_full(theta0, images, labels, lr, wanted)
    else:
        options = _SweepOptions(wanted, mode == "exact", "cpu" if store == "host" else None, store_every)
        thetas = _Unroll.apply(loop, options, theta0, images, labels, lr)
    return thetas[0] if at is None else tuple(thetas)


@dataclass
class _Step:
    """What it takes to run a step again, bit for bit."""

    index: Tensor | None  # of the batch; None: all images
    record: Any  # the augmentation's parameters, where it draws them
    rng: tuple[Tensor, Tensor | None] | None = None  # generator states before the step, if the step moved them
    buffers: dict[str, Tensor] | None = None  # the module's buffers before the step, if it has any

    def copied_buffers(self, replay: bool = True) -> dict[str, Tensor] | None:
        """Buffers for a replay to change as it likes; None to run on the module's own."""
        return {name: b.clone() for name, b in self.buffers.items()} if replay and self.buffers else None


class _InnerLoop:
    """The student's training: which step does what, and one step's loss and gradient."""

    def __init__(
        self,
        net: nn.Module,
        theta0: Tensor,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int,
        batch_size: int | None,
        batches: Sequence[Tensor] | None,
        generator: torch.Generator | None,
        augment: Callable[..., Tensor] | None,
        label_kind: LabelKind,
        loss_scale: float,
        momentum: float,
        weight_decay: float,
        output: int | None,
        check_finite: bool,
    ):
        self.flat = FlatModule(net)
        self.device = theta0.device if isinstance(theta0, Tensor) else None
        self.label_kind, self.loss_scale, self.output = label_kind, loss_scale, output
        self.momentum, self.weight_decay = momentum, weight_decay
        self.augment, self.generator, self.check_finite = augment, generator, check_finite
        self.largest_label = self._check(theta0, images, labels)
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if augment is not None and not callable(augment):
            raise TypeError(f"augment: expected a callable or None, got {type(augment).__name__}")
        self.batches = _check_batches(batches, batch_size, steps, len(images), images.device, generator)
        # the backward pass replays steps: it has to find the net in the mode, and autocast as, it was
        self.training = tuple(m.training for m in self.flat.net.modules())
        self.autocast = (torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type))

    def _check(self, theta0: Tensor, images: Tensor, labels: Tensor) -> int:
        for name, tensor in (("theta0", theta0), ("images", images), ("labels", labels)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.device != theta0.device:
                raise ValueError(f"{name}: expected device {theta0.device} as theta0, got {tensor.device}")
        if not theta0.is_floating_point():
            raise TypeError(f"theta0: expected a floating dtype, got {theta0.dtype}")
        if theta0.shape != (self.flat.numel,):
            raise ValueError(f"theta0: expected shape [{self.flat.numel}] for this net, got {list(theta0.shape)}")
        if images.dim() != 4:
            raise ValueError(f"images: expected [N, C, H, W], got shape {list(images.shape)}")
        if images.dtype != theta0.dtype:
            raise TypeError(f"images: expected dtype {theta0.dtype} as theta0, got {images.dtype}")
        N = len(images)
        if N == 0:
            raise ValueError("images: expected at least one image, got an empty batch")
        if self.label_kind == "hard":
            if labels.dtype != torch.int64:
                raise TypeError(f"labels: expected int64 class numbers for label_kind='hard', got {labels.dtype}")
            if labels.shape != (N,):
                raise ValueError(f"labels: expected shape [{N}] as images, got {list(labels.shape)}")
            low, high = (int(v) for v in labels.aminmax())
            if low < 0:
                raise ValueError(f"labels: expected class numbers >= 0, got {low}")
            return high
        if self.label_kind not in ("logits", "probs"):
            raise ValueError(f"label_kind: expected 'hard', 'logits' or 'probs', got {self.label_kind!r}")
        if labels.dtype != theta0.dtype:
            kind = self.label_kind
            raise TypeError(
                f"labels: expected dtype {theta0.dtype} as theta0 for label_kind={kind!r}, got {labels.dtype}"
            )
        if labels.dim() != 2 or len(labels) != N:
            raise ValueError(f"labels: expected shape [{N}, K], got {list(labels.shape)}")
        return labels.shape[1] - 1

    def begin_step(self, k: int, images: Tensor) -> _Step:
        """Draw what step k leaves to chance."""
        index = self.batches[k]
        record = None
        if hasattr(self.augment, "draw"):
            count = len(images) if index is None else len(index)
            record = self.augment.draw((count, *images.shape[1:]), self.generator)
        return _Step(index, record)

    def loss(self, theta: Tensor, x: Tensor, y: Tensor, step: _Step, buffers: dict[str, Tensor] | None) -> Tensor:
        """The student's loss at theta on the batch (x, y)."""
        if self.augment is not None:
            x = self.augment(x, step.record) if hasattr(self.augment, "draw") else self.augment(x)
        logits = self.flat(theta, x, buffers=buffers)
        if self.output is not None:
            logits = logits[self.output]
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"net: its forward returned a {type(logits).__name__}, expected a tensor of logits; "
                "output=i takes element i of a tuple"
            )
        if logits.dim() != 2 or len(logits) != len(x):
            raise ValueError(f"net: expected logits [{len(x)}, K], got shape {list(logits.shape)}")
        if self.label_kind == "hard":
            if self.largest_label >= logits.shape[1]:
                K = logits.shape[1]
                highest = self.largest_label
                raise ValueError(f"labels: expected class numbers below the net's {K} classes, got {highest}")
        elif logits.shape[1] != y.shape[1]:
            raise ValueError(f"labels: expected [N, {logits.shape[1]}] for the net's classes, got [N, {y.shape[1]}]")
        elif self.label_kind == "logits":
            y = y.softmax(1)
        return self.loss_scale * F.cross_entropy(logits, y)

    def batch(self, step: _Step, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if step.index is None else (images[step.index], labels[step.index])

    def run_full(self, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, wanted: tuple) -> list[Tensor]:
        """Plain autograd through every step."""
        if not theta.requires_grad:
            theta = theta.detach().requires_grad_()
        velocity, finite, kept = None, [], {}
        with torch.enable_grad():
            for k in range(max(wanted)):
                step = self.begin_step(k, images)
                loss = self.loss(theta, *self.batch(step, images, labels), step, None)
                (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
                theta, velocity = self.update(theta, grad, velocity, lr)
                finite.append(torch.isfinite(theta.detach()).all())
                kept[k + 1] = theta
        self.raise_if_not_finite(finite)
        return [kept[t] for t in wanted]

    def gradient(self, theta: Tensor, step: _Step, images: Tensor, labels: Tensor, replay: bool) -> Tensor:
        """g_k alone; a replay leaves generators and buffers as they are."""
        with torch.enable_grad(), self.replaying(step) if replay else contextlib.nullcontext():
            theta = theta.detach().requires_grad_()
            x, y = (t.detach() for t in self.batch(step, images, labels))
            return torch.autograd.grad(self.loss(theta, x, y, step, step.copied_buffers(replay)), theta)[0]

    def update(self, theta: Tensor, grad: Tensor, velocity: Tensor | None, lr: Tensor) -> tuple[Tensor, Tensor]:
        velocity_next = grad + self.weight_decay * theta if self.weight_decay else grad
        if self.momentum and velocity is not None:
            velocity_next = self.momentum * velocity + velocity_next
        return theta - lr * velocity_next, velocity_next

    def raise_if_not_finite(self, finite: list[Tensor]) -> None:
        if not self.check_finite:
            return
        flags = torch.stack(finite).tolist()  # the loop's one synchronisation
        if not all(flags):
            step = flags.index(False) + 1
            raise FloatingPointError(
                f"the student's parameters became non-finite in step {step} of {len(flags)}: the learning rate may be "
                "too large; check_finite=False returns them as they are"
            )

    @contextlib.contextmanager
    def recording(self, step: _Step) -> Iterator[None]:
        """Note in ``step`` what running it takes from and does to the surroundings."""
        buffers = dict(self.flat.net.named_buffers())
        if buffers:
            step.buffers = {name: b.detach().clone() for name, b in buffers.items()}
        before = self._rng()
        yield
        if not all(torch.equal(a, b) for a, b in zip(before, self._rng(), strict=True) if a is not None):
            step.rng = before

    @contextlib.contextmanager
    def replaying(self, step: _Step) -> Iterator[None]:
        """The surroundings as they were when ``step`` ran first."""
        if self.training != tuple(m.training for m in self.flat.net.modules()):
            raise RuntimeError("net: its training mode changed between the unroll and its backward pass")
        enabled, dtype = self.autocast
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, dtype=dtype, enabled=enabled))
            if step.rng is not None:
                cuda = self.device.type == "cuda"
                stack.enter_context(torch.random.fork_rng([self.device] if cuda else []))
                torch.set_rng_state(step.rng[0])
                if cuda:
                    torch.cuda.set_rng_state(step.rng[1], self.device)
            yield

    def _rng(self) -> tuple[Tensor, Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None


@dataclass(frozen=True)
class _SweepOptions:
    wanted: tuple[int, ...]  # step numbers whose parameters are returned
    exact: bool  # False: TESLA's first-order estimator
    device: str | None  # where parameters are kept; None: where theta0 is
    every: int  # keep every k-th


class _Trajectory:
    """The parameters of every step, of which some are kept and the others recomputed a stretch at a time."""

    def __init__(self, loop: _InnerLoop, options: _SweepOptions, theta0: Tensor, steps: int):
        self.loop, self.every = loop, options.every
        # velocities matter only where a stretch is recomputed under momentum
        self.keeps_velocity = bool(loop.momentum) and options.every > 1
        rows = (steps - 1) // options.every + 1
        # allocated at once: small blocks between the steps' large ones would fragment the heap
        self.theta = theta0.new_empty((rows, len(theta0)), device=options.device)
        self.velocity = self.theta.new_empty(self.theta.shape) if self.keeps_velocity else None

    def keep(self, k: int, theta: Tensor, velocity: Tensor | None) -> None:
        if k % self.every == 0:
            self.theta[k // self.every] = theta
            if self.keeps_velocity and velocity is not None:
                self.velocity[k // self.every] = velocity

    def stretches(
        self, steps: list[_Step], images: Tensor, labels: Tensor, lr: Tensor
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """From the last to the first: (k, [theta_k, theta_{k+1}, ...]) between two kept vectors."""
        device = images.device
        for row in range(len(self.theta) - 1, -1, -1):
            first = row * self.every
            theta = self.theta[row].to(device)
            velocity = self.velocity[row].to(device) if self.keeps_velocity and first else None
            thetas = [theta]
            for k in range(first, min(first + self.every, len(steps)) - 1):
                grad = self.loop.gradient(theta, steps[k], images, labels, replay=True)
                theta, velocity = self.loop.update(theta, grad, velocity, lr)
                thetas.append(theta)
            yield first, thetas


class _Unroll(torch.autograd.Function):
    """The forward sweep keeping parameters, the reverse sweep replaying one step at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        loop: _InnerLoop,
        options: _SweepOptions,
        theta0: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        T = max(options.wanted)
        differentiable = any(ctx.needs_input_grad)
        trajectory = _Trajectory(loop, options, theta0, T) if differentiable else None
        steps, finite, out = [], [], {}
        theta, velocity = theta0.detach(), None
        for k in range(T):
            step = loop.begin_step(k, images)
            if trajectory is not None:
                trajectory.keep(k, theta, velocity)
                steps.append(step)
            with loop.recording(step) if differentiable else contextlib.nullcontext():
                grad = loop.gradient(theta, step, images, labels, replay=False)
            theta, velocity = loop.update(theta, grad, velocity, lr)
            finite.append(torch.isfinite(theta).all())
            if k + 1 in options.wanted:
                out[k + 1] = theta
        loop.raise_if_not_finite(finite)
        ctx.loop, ctx.options, ctx.steps, ctx.trajectory = loop, options, steps, trajectory
        ctx.save_for_backward(images, labels, lr)  # for their version check: replays must see the same values
        return tuple(out[t].clone() for t in options.wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("unroll: this gradient cannot be differentiated again; mode='full' can")
        loop, options = ctx.loop, ctx.options
        images, labels, lr = ctx.saved_tensors
        _, _, needs_theta0, needs_images, needs_labels, needs_lr = ctx.needs_input_grad
        incoming: dict[int, Tensor] = {}
        for t, grad in zip(options.wanted, grads, strict=True):
            incoming[t] = incoming[t] + grad if t in incoming else grad

        d_images = torch.zeros_like(images) if needs_images else None
        d_labels = torch.zeros_like(labels) if needs_labels else None
        d_lr = torch.zeros_like(lr) if needs_lr else None
        adjoint = torch.zeros_like(grads[0])  # lambda
        w = torch.zeros_like(adjoint)

        for first, thetas in ctx.trajectory.stretches(ctx.steps, images, labels, lr):
            for k in range(first + len(thetas) - 1, first - 1, -1):
                theta, step = thetas[k - first], ctx.steps[k]
                if k + 1 in incoming:
                    adjoint = adjoint + incoming[k + 1]
                w = adjoint + loop.momentum * w if loop.momentum else adjoint
                nu = -lr * w
                grad, curvature, dx, dy = _replay_step(
                    loop, theta, step, images, labels, nu, options.exact, needs_images, needs_labels
                )
                if d_lr is not None:
                    direction = grad + loop.weight_decay * theta if loop.weight_decay else grad
                    d_lr -= torch.dot(w, direction)
                _accumulate(d_images, step.index, dx)
                _accumulate(d_labels, step.index, dy)
                if options.exact:
                    adjoint = adjoint + curvature
                    if loop.weight_decay:
                        adjoint = adjoint + loop.weight_decay * nu
        return None, None, adjoint if needs_theta0 else None, d_images, d_labels, d_lr


def _replay_step(
    loop: _InnerLoop,
    theta: Tensor,
    step: _Step,
    images: Tensor,
    labels: Tensor,
    nu: Tensor,
    exact: bool,
    needs_images: bool,
    needs_labels: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """g_k, and the derivatives of nu . g_k with respect to theta (where ``exact``), images and labels."""
    with torch.enable_grad(), loop.replaying(step):
        theta = theta.detach().requires_grad_()
        x, y = (t.detach() for t in loop.batch(step, images, labels))
        x.requires_grad_(needs_images)
        if needs_labels:
            y.requires_grad_()
        loss = loop.loss(theta, x, y, step, step.copied_buffers())
        (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
        wanted = {"theta": theta} if exact else {}
        if needs_images:
            wanted["x"] = x
        if needs_labels:
            wanted["y"] = y
        found: dict[str, Tensor] = {}
        if wanted and grad.requires_grad:
            derivatives = torch.autograd.grad(
                grad, list(wanted.values()), nu, allow_unused=True, materialize_grads=True
            )
            found = dict(zip(wanted, derivatives, strict=True))
        elif wanted:  # a loss linear in theta: nothing depends on anything
            found = {name: torch.zeros_like(t) for name, t in wanted.items()}
    return grad.detach(), found.get("theta"), found.get("x"), found.get("y")


def _accumulate(total: Tensor | None, index: Tensor | None, part: Tensor | None) -> None:
    if total is None:
        return
    if index is None:
        total += part
    else:
        total.index_add_(0, index, part)


def _check_lr(lr: Tensor | float, theta0: Tensor) -> Tensor:
    if not isinstance(lr, Tensor):
        if not isinstance(lr, (int, float)):
            raise TypeError(f"lr: expected a tensor of one element or a number, got {type(lr).__name__}")
        return theta0.new_tensor(float(lr))
    if lr.numel() != 1:
        raise ValueError(f"lr: expected one element, got shape {list(lr.shape)}")
    if not lr.is_floating_point():
        raise TypeError(f"lr: expected a floating dtype, got {lr.dtype}")
    if lr.device != theta0.device:
        raise ValueError(f"lr: expected device {theta0.device} as theta0, got {lr.device}")
    return lr


def _check_at(at: Sequence[int], steps: int) -> tuple[int, ...]:
    wanted = tuple(at)
    if not wanted:
        raise ValueError("at: expected at least one step number, got none")
    for t in wanted:
        if not isinstance(t, int) or not 1 <= t <= steps:
            raise ValueError(f"at: expected step numbers in 1..{steps}, got {t!r}")
    return wanted


def _check_batches(
    batches: Sequence[Tensor] | None,
    batch_size: int | None,
    steps: int,
    N: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> list[Tensor | None]:
    if batches is None:
        return _draw_batches(batch_size, steps, N, device, generator)
    if batch_size is not None:
        raise ValueError("batches: expected either batches or batch_size, got both")
    if len(batches) != steps:
        raise ValueError(f"batches: expected {steps} index tensors, one a step, got {len(batches)}")
    for k, index in enumerate(batches):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            raise TypeError(f"batches[{k}]: expected a one-dimensional int64 tensor")
        if len(index) == 0:
            raise ValueError(f"batches[{k}]: expected at least one image, got an empty batch")
        if index.device != device:
            raise ValueError(f"batches[{k}]: expected device {device} as images, got {index.device}")
    low, high = (int(v) for v in torch.cat(list(batches)).aminmax())
    if low < 0 or high >= N:
        raise ValueError(f"batches: expected image numbers in 0..{N - 1}, got {low if low < 0 else high}")
    return list(batches)


def _draw_batches(
    batch_size: int | None, steps: int, N: int, device: torch.device, generator: torch.Generator | None
) -> list[Tensor | None]:
    """Chunks of permutations, each permutation used up before the next is drawn."""
    if batch_size is None:
        return [None] * steps
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an int of at least 1 or None, got {batch_size!r}")
    drawn: list[Tensor | None] = []
    while len(drawn) < steps:
        source = generator.device if generator is not None else "cpu"
        drawn += torch.randperm(N, generator=generator, device=source).to(device).split(batch_size)
    return drawn[:steps]
