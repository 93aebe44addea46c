"""The students' training: the steps' batches, each step's random draws, and the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pydistill._devices import to_device
from pydistill.augment import DiffAugment, MultiCrop
from pydistill.ops._precision import Precision, check_switches
from pydistill.ops.convnet_step import LabelKind
from pydistill.trajectory.arguments import (
    check_augment,
    check_batches,
    check_generators,
    check_rate,
    check_training_set,
)
from pydistill.trajectory.compiled import CompiledStudents
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.generic import GenericStudents, flat_gradient
from pydistill.trajectory.memory import KeptSteps, Memory
from pydistill.trajectory.optimizers import SGD, Adam, State
from pydistill.trajectory.step import Adjoint, Batch, of_student
from pydistill.trajectory.students import ConvNetStudents, Engine, choose_students
from pydistill.trajectory.surroundings import Surroundings


class NonFiniteError(FloatingPointError):
    """A student's parameters became non-finite; ``where`` says in which step."""

    def __init__(self, where: str):
        super().__init__(f"{where}: the learning rate may be too large; check_finite=False returns them as they are")
        self.where = where


@dataclass
class Step:
    """What is needed to run a step again, bit for bit."""

    number: int
    index: Tensor | None  # of the batch, [B] or [E, B]; None: all images
    records: list[Any] | None  # the augmentation's parameters, one per student, where it draws them
    began: tuple[Tensor, Tensor | None] | None = None  # generator states before it, where it was augmented ahead
    rng: tuple[Tensor, Tensor | None] | None = None  # generator states before the step, if the step moved them
    buffers: dict[str, Tensor] | None = None  # the module's buffers before the step, if it has any

    def copied_buffers(self) -> dict[str, Tensor]:
        """Buffers that a replay may change; none where none were recorded."""
        return {name: b.clone() for name, b in (self.buffers or {}).items()}


class InnerLoop:
    """E students in training: which step does what. Checks the arguments of `pydistill.unroll` that concern it."""

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
        generator: torch.Generator | Sequence[torch.Generator] | None,
        augment: Callable[..., Tensor] | None,
        label_kind: LabelKind,
        loss_scale: float,
        optimizer: Literal["sgd"] | Adam,
        momentum: float,
        weight_decay: float,
        warmup: int,
        output: int | None,
        check_finite: bool | None,
        engine: Engine,
        precision: Precision,
        memory: Memory,
        mode: str,
    ):
        self.flat = FlatModule(net)
        self.device = theta0.device if isinstance(theta0, Tensor) else None
        self.label_kind, self.loss_scale = label_kind, loss_scale
        self.weight_decay, self.warmup = weight_decay, warmup
        self.augment = augment
        largest_label, self.own_labels = check_training_set(self.flat, theta0, images, labels, label_kind)
        self.check_finite = not theta0.is_cuda if check_finite is None else check_finite
        self.num_students = len(theta0) if theta0.dim() == 2 else 1
        generators = check_generators(generator, self.num_students)
        self.generators = generators if len(generators) > 1 else generators * self.num_students
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            check_rate(name, value)
        if optimizer != "sgd" and not isinstance(optimizer, Adam):
            raise ValueError(f"optimizer: expected 'sgd' or a pydistill.trajectory.Adam, got {optimizer!r}")
        if momentum and optimizer != "sgd":
            raise ValueError(f"momentum: expected 0 with {optimizer}, which has moments of its own, got {momentum}")
        self.optimizer = SGD(momentum) if optimizer == "sgd" else optimizer
        if not isinstance(warmup, int) or isinstance(warmup, bool):
            raise TypeError(f"warmup: expected an int, got {type(warmup).__name__}")
        if not 0 <= warmup < steps:
            raise ValueError(f"warmup: expected at least 0 and fewer than {steps} steps, got {warmup}")
        check_augment(augment)
        told = memory != "auto" and not isinstance(memory, KeptSteps)
        if told and (not isinstance(memory, int) or isinstance(memory, bool) or memory < 0):
            raise ValueError(f"memory: expected 'auto', a number of bytes or KeptSteps, got {memory!r}")
        self.repeated = batches is not None  # whether a batch may take an image twice
        self.steps = self._draw(steps, batch_size, batches, images)
        self.first: Batch | None = None  # step 0's, where it had to be augmented ahead
        blocked = "mode='full' is autograd through the module" if mode == "full" else None
        ahead = augment is not None and blocked is None and engine != "generic"
        image = self._shape_after(images, labels) if ahead else None
        self.students = choose_students(
            engine, self.flat, images, label_kind, output, largest_label, precision, blocked, image
        )
        if mode == "full":
            check_switches(
                self.students.precision, images.device, images.dtype, "which mode='full' follows, being plain autograd"
            )
        if told and (mode == "full" or isinstance(self.students, CompiledStudents)):
            how = "mode='full' keeps" if mode == "full" else "the compiled engine has none to choose: it keeps"
            what = "every step" if mode == "full" else "parameters alone"
            raise ValueError(f"memory: expected 'auto', {how} {what}, got {memory}")
        self.memory = memory
        self.remembers = self.optimizer.num_moments > 0 or weight_decay > 0
        self.trained = self.decayed = self.flat.trained(theta0)  # [P], zeros where SGD changes nothing; None: ones
        self.unused: tuple[frozenset[str], ...] | None = None  # parameters that the first step's losses did not use
        # the student engine neither depends on the surroundings nor changes them
        self.secluded = isinstance(self.students, ConvNetStudents) and augment is None
        # the backward pass replays steps: the net's mode and torch's state must be what they were
        self.modes = self._modes()
        self.code = self._code()
        self.surroundings = None if self.secluded else Surroundings(self.device)

    def _draw(self, steps: int, batch_size: int | None, batches: Sequence[Tensor] | None, images: Tensor) -> list[Step]:
        """All random draws of the steps, in the order of students that train one after the other."""
        N, device = images.shape[-4], images.device
        given = None if batches is None else check_batches(batches, batch_size, steps, N, device, self.num_students)
        draw: Callable[..., Any] | None = getattr(self.augment, "draw", None)
        indices: list[Sequence[Tensor | None]] = []
        records: list[list[Any]] = []
        for generator in self.generators:
            own: Sequence[Tensor | None] = given or _draw_batches(batch_size, steps, N, generator)
            indices.append(own)
            if draw is not None:
                counts = [N if index is None else index.shape[-1] for index in own]
                records.append([_own(draw((n, *images.shape[-3:]), generator)) for n in counts])
        shared = given is not None or batch_size is None or self.num_students == 1
        batch: list[Tensor | None] = [
            indices[0][k] if shared else torch.stack([cast(Tensor, own[k]) for own in indices]) for k in range(steps)
        ]
        if given is None and batch_size is not None:
            batch = [*_moved(cast("list[Tensor]", batch), device)]
        if type(self.augment) in (DiffAugment, MultiCrop):  # another, or a subclass, may want its records as drawn
            moved = _moved([record for own in records for record in own], device)
            records = [moved[e * steps : (e + 1) * steps] for e in range(self.num_students)]
        return [Step(k, batch[k], [own[k] for own in records] if draw is not None else None) for k in range(steps)]

    def batch(self, step: Step, images: Tensor, labels: Tensor) -> Batch:
        """The step's images, before augmentation, and labels."""
        return Batch(
            select_rows(images, step.index, images.dim() == 5),
            select_rows(labels, step.index, self.own_labels),
            self.own_labels or (step.index is not None and step.index.dim() == 2),
        )

    def augmented(self, batch: Batch, step: Step) -> Batch:
        if self.augment is None:
            return batch
        rows = []
        for e in range(self.num_students):
            x = batch.images[e] if batch.images.dim() == 5 else batch.images
            rows.append(self.augment(x, step.records[e]) if step.records is not None else self.augment(x))
        alone = self.num_students == 1 and batch.images.dim() == 4
        times = copies(len(rows[0]), batch.images.shape[-4])
        return batch._replace(
            images=rows[0] if alone else torch.stack(rows), labels=repeat(batch.labels, times, batch.per_student)
        )

    def _shape_after(self, images: Tensor, labels: Tensor) -> Sequence[int]:
        """(C, H, W) of augmented images; an augmentation that does not state it gets its first batch now."""
        shape_after = getattr(self.augment, "shape_after", None)
        if shape_after is not None:
            return shape_after(images.shape[-4:])[-3:]
        step = self.steps[0]
        step.began = self._rng()
        with torch.no_grad():
            self.first = self.augmented(self.batch(step, images.detach(), labels.detach()), step)
        return self.first.images.shape[-3:]

    def gradient(
        self, theta: Tensor, step: Step, images: Tensor, labels: Tensor, *, replay: bool, keep: bool
    ) -> Tensor:
        """Every student's g ``[E, P]``; a replay leaves generators and buffers unchanged."""
        with torch.no_grad(), self.replaying(step) if replay else contextlib.nullcontext():
            batch = None
            if step.number == 0 and not replay:
                batch, self.first = self.first, None
            if batch is None:
                batch = self.augmented(self.batch(step, images, labels), step)
            buffers = step.copied_buffers() if replay else None
            found = self.students.gradient(theta, batch, buffers, step.number if keep else None)
        self.check_unused(step, theta, found.unused)
        grad = found.grad if self.trained is None else found.grad * self.trained
        return grad if self.loss_scale == 1 else grad * self.loss_scale

    def check_unused(self, step: Step, theta: Tensor, unused: tuple[frozenset[str], ...]) -> None:
        """Parameters that no loss uses are left alone; those used in some steps only would need their own moments."""
        if not self.remembers or unused == (self.unused or ()):
            return
        if self.unused is None:
            self.unused = unused
            if any(unused):
                rows = [self.flat.trained(theta, names) for names in unused]
                self.decayed = torch.stack([torch.ones_like(theta[0]) if row is None else row for row in rows])
            return
        names = next(a ^ b for a, b in zip(unused, self.unused, strict=True) if a != b)
        raise RuntimeError(
            f"net: its loss in step {step.number + 1} does not use the same parameters as in the first one, but "
            f"{min(names)!r} in one of them alone, which momentum and weight_decay are not differentiated for"
        )

    def decay(self, theta: Tensor) -> Tensor:
        """weight_decay times theta ``[E, P]``, except for parameters that SGD leaves alone."""
        return self.weight_decay * (theta if self.decayed is None else theta * self.decayed)

    def adjoint(
        self,
        theta: Tensor,
        direction: Tensor,
        scale: Tensor,
        step: Step,
        images: Tensor,
        labels: Tensor,
        *,
        curvature: bool,
        needs_images: bool,
        needs_labels: bool,
    ) -> Adjoint:
        """<g, direction> ``[E]``, and ``scale`` ``[E]`` times its derivatives: along theta, and along the step's batch
        of images (before augmentation) and labels, summed over the students that share it."""
        if self.loss_scale != 1:
            scale = scale * self.loss_scale
        with self.replaying(step):
            plain = self.batch(step, images.detach(), labels.detach())
            moving = needs_images and self.augment is not None
            if moving:
                plain.images.requires_grad_()
            with torch.set_grad_enabled(moving):
                batch = self.augmented(plain, step)
            found = self.students.adjoint(
                theta,
                direction,
                scale,
                batch._replace(images=batch.images.detach()),
                step.copied_buffers(),
                step.number,
                curvature=curvature,
                images=needs_images,
                labels=needs_labels,
            )
        dx, dy = found.images, found.labels
        if dx is not None:
            if batch.images.dim() == 4:
                dx = dx.sum(0) if len(dx) > 1 else dx[0]
            if moving:
                (dx,) = torch.autograd.grad(batch.images, plain.images, dx)
        if dy is not None:
            dy = dy.unflatten(1, (-1, plain.images.shape[-4])).sum(1)  # over the copies that `repeat` made of a label
            if not batch.per_student:
                dy = dy.sum(0) if len(dy) > 1 else dy[0]
        slope = found.slope if self.loss_scale == 1 else found.slope * self.loss_scale
        return Adjoint(slope, found.curvature, dx, dy)

    def accumulate(self, total: Tensor | None, step: Step, part: Tensor | None, own: bool) -> None:
        """Add a batch's ``part`` to the rows that `batch` took; ``own``: total has [E] in front."""
        if total is None:
            return
        assert part is not None  # where there is a total
        index = step.index
        if index is None:
            total += part
        elif total.is_cuda and (index.dim() == 2 or self.repeated):
            # index_add_ adds to a row in any order there, this one in the order of the index
            if not own:
                total.index_put_((index,), part, accumulate=True)
            elif index.dim() == 1:
                total.transpose(0, 1).index_put_((index,), part.transpose(0, 1), accumulate=True)
            else:
                students = torch.arange(len(index), device=index.device)[:, None]
                total.index_put_((students, index), part, accumulate=True)
        elif not own:
            total.index_add_(0, index.flatten(), part.flatten(0, index.dim() - 1))
        elif index.dim() == 1:
            total.index_add_(1, index, part)
        else:
            for rows, where, what in zip(total, index, part, strict=True):
                rows.index_add_(0, where, what)

    def run_full(self, theta0: Tensor, images: Tensor, labels: Tensor, lr: Tensor, wanted: tuple) -> list[Tensor]:
        """Plain autograd through every step after the warm-up."""
        students = cast(GenericStudents, self.students)
        theta = theta0 if theta0.requires_grad else theta0.detach().requires_grad_()
        state, largest, kept = State(theta, ()), [], {}
        with torch.enable_grad():
            for k in range(max(wanted)):
                if k == self.warmup > 0:  # theta0 stays in the graph, with derivative zero
                    state = state._replace(theta=state.theta + (theta0 - theta0))
                batch = self.augmented(self.batch(self.steps[k], images, labels), self.steps[k])
                theta = state.theta if state.theta.requires_grad else state.theta.requires_grad_()
                differentiable, found = k >= self.warmup, []
                for e, row in enumerate(theta):
                    named = self.flat.unflatten(row)
                    loss = self.loss_scale * students.loss(named, *of_student(batch, e))
                    found.append(flat_gradient(loss, named, create_graph=differentiable))
                grads, unused = zip(*found, strict=True)
                self.check_unused(self.steps[k], theta.detach(), unused)
                with torch.set_grad_enabled(differentiable):
                    grad = torch.stack(grads) if self.trained is None else torch.stack(grads) * self.trained
                    state = self.update(k, State(theta, state.moments), grad, lr)
                if self.check_finite:
                    largest.append(largest_of(state.theta.detach()[None])[0])
                kept[k + 1] = state.theta
        if self.check_finite:
            self.raise_if_not_finite(largest)
        return [kept[t] for t in wanted]

    def update(self, k: int, state: State, grad: Tensor, lr: Tensor) -> State:
        q = grad + self.decay(state.theta) if self.weight_decay else grad
        return self.optimizer.step(k, state, q, lr.view(-1, 1))

    def raise_if_not_finite(self, largest: list[Tensor]) -> None:
        flags = torch.stack(largest).isfinite().tolist()
        if not all(flags):
            step = flags.index(False) + 1
            raise NonFiniteError(f"the student's parameters became non-finite in step {step} of {len(flags)}")

    def raise_if_changed(self) -> None:
        if self.modes != self._modes():
            raise RuntimeError("net: its training mode changed between the unroll and its backward pass")
        if self.code != self._code():
            raise RuntimeError("net: modules, hooks or a forward changed between the unroll and its backward pass")

    def _modes(self) -> list[bool]:
        return [module.training for module in self.flat.net.modules()]

    def _code(self) -> list[Any] | None:
        """The code that calling the net runs; None where the backward pass does not call it."""
        if isinstance(self.students, ConvNetStudents):
            return None
        return [
            (module, vars(module).get("forward"), *module._forward_pre_hooks.values(), *module._forward_hooks.values())
            for module in self.flat.net.modules()
        ]

    def as_in_forward(self) -> contextlib.AbstractContextManager[None]:
        """Torch's settings as they were when the unroll began."""
        return contextlib.nullcontext() if self.surroundings is None else self.surroundings.restored()

    def recording(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """Record in ``step`` what running it takes from the surroundings and changes in them."""
        return contextlib.nullcontext() if self.secluded else self._recording(step)

    @contextlib.contextmanager
    def _recording(self, step: Step) -> Iterator[None]:
        buffers = dict(self.flat.net.named_buffers())
        if buffers:
            step.buffers = {name: b.detach().clone() for name, b in buffers.items()}
        before = step.began or self._rng()
        yield
        pairs = zip(before, self._rng(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None):
            step.rng = before

    def replaying(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """The surroundings as they were when ``step`` first ran."""
        return contextlib.nullcontext() if self.secluded else self._replaying(step)

    @contextlib.contextmanager
    def _replaying(self, step: Step) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if step.rng is not None:
                cuda = self.device.type == "cuda"
                stack.enter_context(torch.random.fork_rng([self.device] if cuda else []))
                torch.set_rng_state(step.rng[0])
                if step.rng[1] is not None:
                    torch.cuda.set_rng_state(step.rng[1], self.device)
            yield

    def _rng(self) -> tuple[Tensor, Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None


def largest_of(thetas: Tensor) -> Tensor:
    """[T, E, P] to [T], the largest magnitudes, non-finite where any element is, in one pass."""
    return torch.linalg.vector_norm(thetas, torch.inf, dim=(1, 2))


def select_rows(tensor: Tensor, index: Tensor | None, own: bool) -> Tensor:
    """Rows of ``tensor`` by ``index`` [B] or [E, B]; ``own``: tensor has [E] in front."""
    if index is None:
        return tensor
    if index.dim() == 1:
        return tensor.index_select(1 if own else 0, index)
    if not own:
        return tensor[index]
    return torch.stack([rows[where] for rows, where in zip(tensor, index, strict=True)])


def copies(after: int, before: int) -> int:
    """How many images an augmentation made of one: the first copies of all ``before``, then the second ones, etc."""
    times, rest = divmod(after, before)
    if rest or not times:
        raise ValueError(f"augment: expected as many images as before, or a multiple, got {after} of {before}")
    return times


def repeat(labels: Tensor, times: int, per_student: bool) -> Tensor:
    """Labels [B, ...], or [E, B, ...] if ``per_student``, for as many copies of their images."""
    return labels if times == 1 else torch.cat([labels] * times, 1 if per_student else 0)


def _own(record: Any) -> Any:
    """A copy of a record, which whoever drew it cannot overwrite."""
    return record.clone() if isinstance(record, Tensor) else record


def _moved(drawn: list[Tensor], device: torch.device) -> list[Tensor]:
    """What was drawn for all steps, on ``device`` by one copy."""
    if drawn[0].device == device:
        return drawn
    parts = to_device(torch.cat([each.flatten() for each in drawn]), device).split([each.numel() for each in drawn])
    return [part.view(each.shape) for part, each in zip(parts, drawn, strict=True)]


def _draw_batches(batch_size: int | None, steps: int, N: int, generator: torch.Generator | None) -> list[Tensor | None]:
    """Chunks of permutations, each permutation used up before the next is drawn; where the generator is."""
    if batch_size is None:
        return [None] * steps
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an int of at least 1 or None, got {batch_size!r}")
    drawn: list[Tensor | None] = []
    while len(drawn) < steps:
        source = generator.device if generator is not None else "cpu"
        drawn += torch.randperm(N, generator=generator, device=source).split(batch_size)
    return drawn[:steps]
