r"""Students trained on a fixed set of images: many at once, first order.

This is the loop that evaluates a distilled set ("Dataset Condensation with Gradient Matching", Zhao, Mopuri, Bilen,
ICLR 2021: several fresh networks, the learning rate divided by ten after half of the epochs) and that makes experts
("Dataset Distillation by Matching Training Trajectories", Cazenavette et al., CVPR 2022). For student e, with g the
gradient of the mean cross entropy of its batch at theta_e:

    v_e <- momentum v_e + g + weight_decay theta_e,      theta_e <- theta_e - lr_e schedule(epoch) v_e
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from pydistill._arguments import check_whole
from pydistill._devices import to_device
from pydistill.ops.convnet_step import LabelKind, Precision
from pydistill.trajectory.arguments import (
    check_augment,
    check_eval_data,
    check_generators,
    check_lr,
    check_positive,
    check_rate,
    check_training_set,
    is_of_other_size,
)
from pydistill.trajectory.borrowed import own_buffers, training_mode
from pydistill.trajectory.flat import FlatModule, gsam_combine, sam_perturbation
from pydistill.trajectory.generic import GenericStudents
from pydistill.trajectory.inner_loop import copies, repeat, select_rows
from pydistill.trajectory.recognition import is_recognised
from pydistill.trajectory.smooth import GSAM, Smoothing, clipped
from pydistill.trajectory.step import Batch, Descent
from pydistill.trajectory.students import ConvNetStudents, Engine, choose_students

__all__ = ["EVAL_BATCH", "DivergedError", "TrainResult", "train_students"]

Schedule = Literal["step", "cosine"] | Callable[[int, int], float] | None

EVAL_BATCH = 500  # images a student is tested on at a time
_STEPS_BETWEEN_CHECKS = 64  # at least: checking on a GPU whether the losses are finite synchronises


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The result of `train_students`; every tensor on the device of theta0."""

    theta: Tensor  # [E, P], final parameters
    losses: Tensor  # [epochs, E], cross entropies, mean over an epoch's images, each before its step; dtype of theta
    accuracy: Tensor | None  # [E], float64, the share of eval_data's images that each student gets right
    train_accuracy: Tensor | None  # [epochs, E], float64, of the images as trained on, before each step
    buffers: dict[str, Tensor]  # [E, ...] by name: each student's own, of a net that has buffers
    velocity: Tensor | None = None  # [E, P], after the last step; with momentum

    @torch.no_grad()
    def copy_into(self, net: nn.Module, student: int) -> None:
        """Overwrites the parameters and buffers of ``net``, built like the trained one, with a student's."""
        flat = FlatModule(net)
        flat.overwrite(self.theta[student])
        for name, buffer in flat.net.named_buffers():
            buffer.copy_(self.buffers[name][student])


class DivergedError(FloatingPointError):
    """A student's loss or parameters became non-finite; says which, in which epoch and step (both from 1)."""

    def __init__(self, student: int, epoch: int, step: int, what: str):
        self.where = f"{what.format(f'student {student}')} in epoch {epoch}, step {step}"
        super().__init__(f"{self.where}: the learning rate may be too large; check_finite=False goes on regardless")
        self.student, self.epoch, self.step, self.what = student, epoch, step, what


def train_students(
    net: nn.Module,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: Tensor | float,
    batch_size: int = 256,
    schedule: Schedule = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sharpness: GSAM | None = None,
    smoothing: Smoothing | None = None,
    velocity0: Tensor | None = None,
    label_kind: LabelKind = "hard",
    augment: Callable[..., Tensor] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eval_data: tuple[Tensor, Tensor] | None = None,
    train_accuracy: bool = False,
    check_finite: bool = True,
    output: int | None = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train E students by SGD, all at once where the student engine runs them, else one after the other.

    Equivalent to this loop for every student, with its own generator::

        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = lr * schedule(epoch, epochs)
            for index in torch.randperm(N, generator=generator).split(batch_size):
                x = augment(images[index], augment.draw(images[index].shape, generator))
                optimizer.zero_grad()
                F.cross_entropy(net(x), labels[index]).backward()
                optimizer.step()

    Only the check of the losses waits for a GPU, at most once an epoch. On the student engine the last bits of a
    student's parameters depend on how many are trained at once.

    Args:
        net: the students' structure. As with ``torch.optim.SGD``, parameters that do not require a gradient (unless
            none does) and those that a step's loss does not use keep their values, without decay or momentum. The
            module's parameters, buffers and mode are left unchanged: students train in training mode, each from the
            buffers that ``net`` has.
        theta0: ``[E, P]`` starting parameters, in ``net.parameters()`` order.
        images: ``[N, C, H, W]``, dtype and device of theta0, or `StreamedImages`; or a student's ``[E, N, C, H, W]``.
        labels: int64 ``[N]`` for label_kind "hard"; dtype of theta0 and ``[N, K]`` for "logits" (a softmax is taken)
            and "probs"; or a student's own, with ``[E]`` in front.
        epochs: passes over the images, each in an order of its own.
        lr: the learning rate, positive: a number, a tensor of one element, or ``[E]``.
        batch_size: images per step; an epoch's last step takes what is left.
        schedule: factor on lr, by epoch. "step": a tenth from epoch ``ceil(epochs / 2)`` on, where the momentum is
            also reset, as in the papers' evaluation code; "cosine": half a cosine from one towards zero;
            a function of the epoch (from 0) and the number of epochs; None: one.
        momentum, weight_decay: as in ``torch.optim.SGD`` (no dampening, no Nesterov; the decay is coupled).
        sharpness: `pydistill.trajectory.GSAM`: a second gradient in each step, which finds flatter minima (FTD). It
            redraws what a net draws (dropout) and leaves buffers unchanged.
        smoothing: `pydistill.trajectory.Smoothing`: a gradient penalty, factors on the loss by epoch, and clipping
            (AST). The penalty leaves buffers unchanged.
        velocity0: ``[E, P]``, the ``velocity`` of a training to be continued; needs momentum. None: the first step has
            no velocity.
        label_kind: what ``labels`` holds.
        augment: applied to each student's batch. Either an object with ``draw(shape, generator) -> record`` and
            ``__call__(images, record)``, or a plain function of the images that draws from torch's global generators;
            only those draws come in another order on the student engine than when students train one by one. If m
            times as many images come out, one copy of the batch after the other, the labels are repeated. The size of
            its images decides which engine runs: an object may state it by ``shape_after(shape)``, any other
            augmentation is tried on a batch beforehand, unless the net takes images as they are.
            `pydistill.augment.DiffAugment` is one.
        generator: source of the orders and of ``augment.draw``. One, torch's default when None: students draw from it
            what they would draw one after the other. Or E of them, one per student.
        eval_data: images ``[M, C, H, W]`` and int64 labels ``[M]`` to test the trained students on, in eval mode.
        train_accuracy: also count the images that are classified correctly while training (soft labels: as their
            largest entry), which takes a third more time on the student engine.
        check_finite: raise if a loss is not finite; False returns the result regardless.
        output: which element to take where ``net`` returns a tuple.
        engine: "student", "compiled", "generic" or "auto", as in `pydistill.unroll`; only "generic" has the gradient
            penalty. An epoch's last, smaller batch has its own compiled graph.
        precision: as in `pydistill.unroll`.
        on_step: called after each step, and after each `EVAL_BATCH` images of eval_data, once for every student that
            took it; an exception from it ends the training.
        on_epoch: called after each epoch with a dict: ``students`` (the range that trained: all, or one on the generic
            engine), ``epoch`` (from 1), ``theta`` (their parameters, which further training overwrites), ``losses``
            and ``train_accuracy`` (of the epoch, one per student).

    Returns:
        The trained students, detached from autograd.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it should be.
        DivergedError: a ``FloatingPointError``: a loss or parameter that is not finite; names student, epoch and step.
    """
    flat = FlatModule(net)
    if isinstance(theta0, Tensor) and theta0.dim() != 2:
        raise ValueError(f"theta0: expected shape [E, {flat.numel}] for this net, got {list(theta0.shape)}")
    largest_label, own_labels = check_training_set(flat, theta0, images, labels, label_kind)
    check_whole("epochs", epochs, 1)
    check_whole("batch_size", batch_size, 1)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        check_rate(name, value)
    for name, option, kind in (("sharpness", sharpness, GSAM), ("smoothing", smoothing, Smoothing)):
        if option is not None and not isinstance(option, kind):
            raise TypeError(f"{name}: expected a {kind.__name__} or None, got {type(option).__name__}")
    if velocity0 is not None:
        if not isinstance(velocity0, Tensor):
            raise TypeError(f"velocity0: expected a tensor or None, got {type(velocity0).__name__}")
        if not momentum:
            raise ValueError("velocity0: expected None without momentum")
        if velocity0.shape != theta0.shape or velocity0.dtype != theta0.dtype or velocity0.device != theta0.device:
            got = f"{velocity0.dtype} {list(velocity0.shape)} on {velocity0.device}"
            wanted = f"{theta0.dtype} {list(theta0.shape)} on {theta0.device} as theta0"
            raise ValueError(f"velocity0: expected {wanted}, got {got}")
    check_augment(augment)
    for name, function in (("on_step", on_step), ("on_epoch", on_epoch)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a callable or None, got {type(function).__name__}")
    given = check_generators(generator, len(theta0))
    image: Sequence[int] = images.shape[-3:]
    if augment is not None:
        # a net that takes images as they are says that the augmentation leaves their size
        known = engine == "generic" or is_recognised(flat, image, images.dtype, images.device, "any")
        if hasattr(augment, "shape_after") or not known or is_of_other_size(eval_data, image):
            image = _shape_after(augment, images, batch_size, given[0])
    if eval_data is not None:
        check_eval_data(eval_data, images, image)
    E, N = len(theta0), images.shape[-4]
    rates = check_lr(lr, theta0).detach().to(theta0.dtype).reshape(-1, 1).expand(E, 1)  # [E, 1]
    check_positive(lr if isinstance(lr, Tensor) else torch.tensor(float(lr), dtype=theta0.dtype, device="cpu"))
    factors = schedule_factors(schedule, epochs)
    penalised = smoothing is not None and smoothing.gradient_penalty > 0
    blocked = "smoothing's gradient_penalty is differentiated twice, which autograd alone does" if penalised else None
    with training_mode(flat.net):
        found = []
        for mode in [True] if eval_data is None else [True, False]:  # the forward may depend on it
            flat.net.train(mode)
            found.append(
                choose_students(engine, flat, images, label_kind, output, largest_label, precision, blocked, image)
            )
    students = next((each for each in found if isinstance(each, GenericStudents)), found[0])
    together = isinstance(students, ConvNetStudents)
    kept = students.statistics if isinstance(students, ConvNetStudents) else None
    if kept is not None:
        kept.split(E)
    if len(given) < E:
        given = _forked(given[0], E, epochs, batch_size, images, augment) if together else given * E

    training = _Training(
        flat=flat,
        trained=flat.trained(theta0),
        students=students,
        images=images.detach(),
        labels=labels.detach(),
        own_labels=own_labels,
        factors=factors,
        restart=(epochs + 1) // 2 if schedule == "step" else None,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        sharpness=sharpness,
        smoothing=smoothing,
        augment=augment,
        eval_data=eval_data,
        train_accuracy=train_accuracy,
        check_finite=check_finite,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    theta = theta0.detach().clone()
    losses = theta.new_zeros(epochs, -(-N // batch_size), E)
    right = torch.zeros(epochs, E, dtype=torch.float64, device=theta.device)
    tested = torch.zeros(E, dtype=torch.int64, device=theta.device)
    buffers, velocities = [], []
    for rows in [range(E)] if together else [range(e, e + 1) for e in range(E)]:
        own = slice(rows.start, rows.stop)
        with training_mode(flat.net), own_buffers(flat.net) as now:
            velocity = None if velocity0 is None else velocity0[own].detach().clone()
            velocities.append(
                training.run(rows, theta[own], velocity, rates[own], given[own], losses[..., own], right[:, own])
            )
            if eval_data is not None:
                flat.net.eval()
                training.test(theta[own], tested[own])
            buffers.append(now())
    joined = {name: torch.stack([each[name] for each in buffers]) for name in buffers[0]}
    return TrainResult(
        theta,
        training.means(losses),
        None if eval_data is None else tested.double() / len(eval_data[0]),
        right / N if train_accuracy else None,
        joined if kept is None else kept.buffers(),
        torch.cat(velocities) if momentum else None,
    )


@dataclass(frozen=True, eq=False)
class _Training:
    """What students that train together share."""

    flat: FlatModule
    trained: Tensor | None  # [P], zeros at frozen parameters; None: there are none
    students: GenericStudents | ConvNetStudents
    images: Tensor
    labels: Tensor
    own_labels: bool
    factors: list[float]
    restart: int | None
    batch_size: int
    momentum: float
    weight_decay: float
    sharpness: GSAM | None
    smoothing: Smoothing | None
    augment: Callable[..., Tensor] | None
    eval_data: tuple[Tensor, Tensor] | None
    train_accuracy: bool
    check_finite: bool
    on_step: Callable[[], None] | None
    on_epoch: Callable[[dict[str, Any]], None] | None

    def run(
        self,
        rows: range,
        theta: Tensor,
        velocity: Tensor | None,
        rates: Tensor,
        generators: list[torch.Generator | None],
        losses: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Trains ``theta`` in place; fills ``losses`` [epochs, steps, E] and ``right`` [epochs, E]; the velocity."""
        epochs, steps, _ = losses.shape
        own_images = self.images.dim() == 5
        images = self.images[rows.start : rows.stop] if own_images else self.images
        labels = self.labels[rows.start : rows.stop] if self.own_labels else self.labels
        checked = 0
        for epoch, factor in enumerate(self.factors):
            if epoch == self.restart:
                velocity = None
            minus_rates = -factor * rates
            orders = [_order(images.shape[-4], generator) for generator in generators]
            for step, index in enumerate(to_device(torch.stack(orders), theta.device).split(self.batch_size, 1)):
                with torch.no_grad():
                    x, y = select_rows(images, index, own_images), select_rows(labels, index, self.own_labels)
                    batch = plain = Batch(x, y, True)
                    times = 1
                    if self.augment is not None:
                        x = torch.stack([self._augmented(*each) for each in zip(x, generators, strict=True)])
                        times = copies(x.shape[1], index.shape[1])
                        y = repeat(y, times, True)
                        batch = Batch(x, y, True)
                    found, moving = self._gradient(theta, batch, plain, epoch)
                    losses[epoch, step] = found.losses
                    if found.logits is not None:
                        classes = y if y.dim() == 2 else y.argmax(-1)
                        right[epoch] += (found.logits.argmax(-1) == classes).sum(1) / times
                    velocity = self._descend(theta, found.grad, velocity, minus_rates, moving)
                self._stepped(rows)
            if self.check_finite and ((epoch + 1 - checked) * steps >= _STEPS_BETWEEN_CHECKS or epoch + 1 == epochs):
                _raise_if_not_finite(losses[: epoch + 1], theta, rows)
                checked = epoch + 1
            if self.on_epoch is not None:
                record = {"students": rows, "epoch": epoch + 1, "theta": theta, "losses": self.means(losses[epoch])}
                counted = right[epoch] / images.shape[-4] if self.train_accuracy else None
                self.on_epoch(record | {"train_accuracy": counted})
        assert velocity is not None  # after a step
        return velocity

    def _gradient(self, theta: Tensor, batch: Batch, plain: Batch, epoch: int) -> tuple[Descent, Tensor | None]:
        """The losses of ``batch`` and the gradient to descend along; ``plain``: the batch before augmentation. Also
        [P], zeros at parameters that have no gradient, which stay as they are (None: no zeros)."""
        found = self._objective(theta, batch, plain, epoch)
        grad = found.grad
        (unused,) = set(found.unused) or (frozenset(),)
        moving = self.flat.trained(theta, unused) if unused else self.trained
        if self.sharpness is not None:
            rho, alpha = self.sharpness.rho, self.sharpness.alpha
            perturbed = theta + sam_perturbation(grad, rho, theta if self.sharpness.adaptive else None)
            grad = gsam_combine(self._objective(perturbed, batch, plain, epoch, again=True).grad, grad, alpha)
        if self.smoothing is not None and self.smoothing.clip_norm is not None:
            grad = clipped(grad, self.smoothing.clip_norm)
        return found._replace(grad=grad), moving

    def _objective(self, theta: Tensor, batch: Batch, plain: Batch, epoch: int, *, again: bool = False) -> Descent:
        """The losses, and the gradient of all that is minimised at theta."""
        buffers = self._spare_buffers() if again else None
        wants_logits = self.train_accuracy and not again
        found = self.students.gradient(theta, batch, buffers, None, with_logits=wants_logits)
        if self.smoothing is not None:
            if epoch < len(self.smoothing.loss_decay):
                found.grad.mul_(self.smoothing.loss_decay[epoch])
            if weight := self.smoothing.gradient_penalty:
                students = cast(GenericStudents, self.students)
                penalty = students.penalty_gradient(theta, plain.images, self._spare_buffers())
                found.grad.add_(penalty, alpha=weight)
        if self.trained is not None:
            found.grad.mul_(self.trained)
        return found

    def _spare_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.flat.net.named_buffers()}

    def _augmented(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        assert self.augment is not None
        draw = getattr(self.augment, "draw", None)
        return self.augment(x) if draw is None else self.augment(x, draw(x.shape, generator))

    def _descend(
        self, theta: Tensor, grad: Tensor, velocity: Tensor | None, minus_rates: Tensor, moving: Tensor | None
    ) -> Tensor:
        """A step of SGD in place: ``grad`` is overwritten, and is the velocity after a first step."""
        if self.weight_decay:
            grad.add_(theta if moving is None else theta * moving, alpha=self.weight_decay)
        if self.momentum and velocity is not None:
            if moving is None:
                grad = velocity.mul_(self.momentum).add_(grad)
            else:
                grad = torch.where(moving > 0, grad.add_(velocity, alpha=self.momentum), velocity)
        theta.addcmul_(grad if moving is None else grad * moving, minus_rates)
        return grad

    @torch.no_grad()
    def test(self, theta: Tensor, right: Tensor) -> None:
        """Adds to ``right`` [E] how many of eval_data's images are classified correctly."""
        students = self.students.in_evaluation()
        assert self.eval_data is not None
        for x, y in zip(*(tensor.split(EVAL_BATCH) for tensor in self.eval_data), strict=True):
            right += (students.logits(theta, x).argmax(-1) == y).sum(1)
            self._stepped(range(len(theta)))

    def means(self, losses: Tensor) -> Tensor:
        """``[..., steps, E]`` to ``[..., E]``: over the epoch's images, the last step having fewer."""
        sizes = losses.new_full((losses.shape[-2], 1), self.batch_size)
        sizes[-1] = self.images.shape[-4] - self.batch_size * (len(sizes) - 1)
        return (losses * sizes).sum(-2) / self.images.shape[-4]

    def _stepped(self, rows: range) -> None:
        if self.on_step is not None:
            for _ in rows:
                self.on_step()


def _order(N: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(N, generator=generator, device="cpu" if generator is None else generator.device)


def _forked(
    generator: torch.Generator | None,
    E: int,
    epochs: int,
    batch_size: int,
    images: Tensor,
    augment: Callable[..., Tensor] | None,
) -> list[torch.Generator | None]:
    """One per student, in the state that ``generator`` has once the students before it have drawn all they need.

    Drawing twice is cheap compared with the training, and keeps only a state where the draws may be large.
    """
    source = torch.default_generator if generator is None else generator
    N, image = images.shape[-4], images.shape[-3:]
    draw = getattr(augment, "draw", None)
    forks: list[torch.Generator | None] = []
    for _ in range(E):
        forks.append(torch.Generator(source.device).set_state(source.get_state()))
        for _ in range(epochs):
            for index in _order(N, source).split(batch_size):
                if draw is not None:
                    draw(torch.Size((len(index), *image)), source)
    return forks


def _raise_if_not_finite(losses: Tensor, theta: Tensor, rows: range) -> None:
    """``losses`` [epochs, steps, E]; one synchronisation with the device, more only on failure."""
    if bool(losses.isfinite().all() & theta.isfinite().all()):
        return
    for epoch, step, e in (~losses.isfinite()).nonzero()[:1].tolist():
        raise DivergedError(rows[e], epoch + 1, step + 1, f"the loss of {{}} is {losses[epoch, step, e].item()}")
    e = int((~theta.isfinite()).any(1).nonzero()[0])
    raise DivergedError(rows[e], losses.shape[0], losses.shape[1], "the parameters of {} are no longer finite")


def schedule_factors(schedule: Schedule, epochs: int) -> list[float]:
    """The factor on the learning rate, by epoch; ValueError for an unknown schedule or a wrong factor."""
    if schedule is None:
        return [1.0] * epochs
    if schedule == "step":
        return [1.0 if epoch < (epochs + 1) // 2 else 0.1 for epoch in range(epochs)]
    if schedule == "cosine":
        return [(1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]
    if not callable(schedule):
        raise ValueError(f"schedule: expected None, 'step', 'cosine' or a function, got {schedule!r}")
    factors = [float(schedule(epoch, epochs)) for epoch in range(epochs)]
    for epoch, factor in enumerate(factors):
        if not 0 <= factor < math.inf:
            raise ValueError(f"schedule: expected a finite factor >= 0, got {factor} for epoch {epoch}")
    return factors


def _shape_after(
    augment: Callable[..., Tensor], images: Tensor, batch_size: int, generator: torch.Generator | None
) -> Sequence[int]:
    """(C, H, W) of augmented images; leaves torch's, numpy's and Python's generators unchanged."""
    if hasattr(augment, "shape_after"):
        return augment.shape_after(images.shape[-4:])[-3:]
    x = (images[0] if images.dim() == 5 else images).detach()[:batch_size]
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002, the global one is meant
    with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
        try:
            if not hasattr(augment, "draw"):
                return augment(x).shape[-3:]
            source = torch.default_generator if generator is None else generator
            spare = torch.Generator(source.device).set_state(source.get_state())
            return augment(x, augment.draw(x.shape, spare)).shape[-3:]
        finally:
            np.random.set_state(numbers)  # noqa: NPY002
            random.setstate(python)
