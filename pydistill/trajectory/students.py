"""How students take a step: by autograd through any module, compiled, or hand-written where the module is a ConvNet.

All compute the same two things for a step of E students at theta ``[E, P]``: the gradient g of each student's loss
(`gradient`), and the derivatives of <g, direction> (`adjoint`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from pydistill._arguments import check_choice, check_whole
from pydistill.ops._convnet_step_layers import kept_bytes
from pydistill.ops._precision import Precision, Resolved, check_switches, resolved
from pydistill.ops.attention_map import Axis
from pydistill.ops.convnet_step import (
    ConvNetShape,
    LabelKind,
    Workspace,
    convnet_features,
    convnet_features_backward,
    convnet_gradient,
    convnet_logits,
    convnet_tangent,
    tape_bytes,
    workspace_bytes,
)
from pydistill.trajectory.compiled import CompiledStudents
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.generic import GenericStudents
from pydistill.trajectory.kept_statistics import KeptStatistics
from pydistill.trajectory.memory import AUTO, KeptSteps, Memory, room_for_steps
from pydistill.trajectory.recognition import Output, Unrecognised, recognised
from pydistill.trajectory.step import Adjoint, Batch, Descent, check_classes

Engine = Literal["auto", "student", "compiled", "generic"]

_log = logging.getLogger("pydistill")


class ConvNetStudents:
    """ConvNets, all students at once, on `pydistill.ops.convnet_step`.

    The last steps, as many as a budget allows, keep their tapes, so that the reverse sweep need not run them again.
    """

    _idle: ClassVar[list[Tensor]] = []  # at most one: the tapes' memory that one unroll leaves to the next

    def __init__(
        self,
        shape: ConvNetShape,
        label_kind: LabelKind,
        largest_label: int,
        precision: Resolved,
        statistics: KeptStatistics | None,
    ):
        self.shape, self.label_kind, self.precision = shape, label_kind, precision
        self.largest_label = largest_label
        self.statistics = statistics  # of batch norms
        self._running = statistics.running() if statistics is not None and shape.norm == "running" else None
        self.workspace = Workspace()
        self.tapes: dict[int, Tensor | list[Tensor]] = {}
        self._first_kept, self._tapes_bytes = 0, 0
        self._memory: Tensor | None = None  # of the tapes

    def plan(
        self, memory: Memory, steps: int, students: int, images: int, theta: Tensor, stored: int, first: int = 0
    ) -> None:
        """Decide which steps, from ``first`` on, keep their tape within ``memory``; ``stored``: bytes of parameters the
        unroll keeps."""
        size = self._tape_bytes(students, images, theta)
        least = stored
        if theta.device.type == "cpu":
            least += workspace_bytes(self.shape, "tangent", students, images, theta.dtype, self.precision)
        number = memory.number if isinstance(memory, KeptSteps) else None
        if number is None:
            number = min(room_for_steps(memory, theta.device, least) // size, steps - first)
            if isinstance(memory, KeptSteps):
                memory.number = number
        self._first_kept = max(first, steps - number)  # the reverse sweep starts at the end
        self._tapes_bytes, self._memory = (steps - self._first_kept) * size, None

    def _tape_bytes(self, students: int, images: int, theta: Tensor) -> int:
        of_one = tape_bytes if theta.device.type == "cpu" else kept_bytes
        return of_one(self.shape, students, images, theta.dtype, self.precision)

    def _tape(self, step: int, theta: Tensor, images: int) -> Tensor | list[Tensor] | None:
        """For one step; None where there is no room: an unknown augmentation may have made more images."""
        size = self._tape_bytes(len(theta), images, theta)
        if theta.device.type != "cpu":
            if size > self._tapes_bytes:
                return None
            self._tapes_bytes -= size
            self.tapes[step] = []
        else:
            memory = self._tape_memory()
            if size > len(memory):
                return None
            self.tapes[step], self._memory = memory[:size], memory[size:]
        return self.tapes[step]

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """[E, B, K]."""
        with torch.no_grad():
            return convnet_logits(
                self.shape,
                theta,
                images,
                precision=self.precision,
                running=self._running,
                workspace=self.workspace,
            )

    def in_evaluation(self) -> ConvNetStudents:
        """The same students with their nets in evaluation mode."""
        if self.shape.norm != "batch" or self.statistics is None or not self.statistics.tracked:
            return self
        shape = replace(self.shape, norm="running")
        return ConvNetStudents(shape, self.label_kind, self.largest_label, self.precision, self.statistics)

    def gradient(
        self,
        theta: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        keep: int | None,
        *,
        with_logits: bool = False,
    ) -> Descent:
        check_classes(self.label_kind, self.largest_label, batch.labels, self.shape.classes)
        tape = None
        if keep is not None and keep >= self._first_kept:
            tape = self._tape(keep, theta, batch.images.shape[-4])
        logits = self.logits(theta, batch.images) if with_logits else None
        own = self.statistics if self.shape.norm == "batch" and buffers is None else None
        moving = own is not None and own.tracked
        statistics = theta.new_empty(len(theta), 2, sum(self.shape.widths)) if moving else None
        with torch.no_grad():
            losses, grad = convnet_gradient(
                self.shape,
                theta,
                batch.images,
                batch.labels,
                label_kind=self.label_kind,
                precision=self.precision,
                running=self._running,
                statistics=statistics,
                workspace=self.workspace,
                tape=tape,
            )
            if own is not None and statistics is not None:
                own.update(self.shape, statistics, batch.images.shape[-4])
        return Descent(losses, grad, logits)

    def features(
        self, theta: Tensor, images: Tensor, p: float, attended: Sequence[int], axis: Axis, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `convnet_features`; ``keep``: keep what `features_backward` needs, within the budget."""
        tape = None
        if keep:
            self.plan("auto", 1, len(theta), images.shape[-4], theta, 0)
            if self._first_kept == 0:
                tape = self.tapes[0] = self._tape_memory()[: self._tapes_bytes]
        with torch.no_grad():
            return convnet_features(
                self.shape,
                theta,
                images,
                p=p,
                attended=attended,
                axis=axis,
                precision=self.precision,
                running=self._running,
                workspace=self.workspace,
                tape=tape,
            )

    def features_backward(
        self, theta: Tensor, images: Tensor, grads: Sequence[Tensor | None], p: float, attended: Sequence[int]
    ) -> Tensor:
        """[E, N, C, H, W], from the gradients in the results of `features`."""
        spatial, channel, embedding = grads
        with torch.no_grad():
            return convnet_features_backward(
                self.shape,
                theta,
                images,
                spatial,
                channel,
                embedding,
                p=p,
                attended=attended,
                precision=self.precision,
                running=self._running,
                workspace=self.workspace,
                tape=cast("Tensor | None", self.tapes.get(0)),  # features are kept on the CPU alone
            )

    def _tape_memory(self) -> Tensor:
        """What is left of it. Freshly mapped pages cost more than a small step's tape saves: they are handed on."""
        if self._memory is None:
            try:
                block = self._idle.pop()
            except IndexError:
                block = torch.empty(0, dtype=torch.uint8, device="cpu")
            if len(block) < self._tapes_bytes:
                block = torch.empty(self._tapes_bytes, dtype=torch.uint8, device="cpu")
            self._memory = block
            if len(block) <= AUTO:
                weakref.finalize(self, self._hand_on, block).atexit = False
        return self._memory

    @classmethod
    def _hand_on(cls, block: Tensor) -> None:
        cls._idle[:] = [block]

    def adjoint(
        self,
        theta: Tensor,
        direction: Tensor,
        scale: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        kept: int | None,
        *,
        curvature: bool,
        images: bool,
        labels: bool,
    ) -> Adjoint:
        with torch.no_grad():
            found = Adjoint(
                *convnet_tangent(
                    self.shape,
                    theta,
                    direction,
                    batch.images,
                    batch.labels,
                    label_kind=self.label_kind,
                    precision=self.precision,
                    curvature=curvature,
                    scale=scale,
                    running=self._running,
                    workspace=self.workspace,
                    tape=None if kept is None else self.tapes.pop(kept, None),
                )
            )
        return found._replace(images=found.images if images else None, labels=found.labels if labels else None)


def choose_students(
    engine: Engine,
    flat: FlatModule,
    images: Tensor,
    label_kind: LabelKind,
    output: Output,
    largest_label: int,
    precision: Precision,
    blocked: str | None = None,
    image: Sequence[int] | None = None,
) -> GenericStudents | ConvNetStudents:
    """The engine that runs ``flat``'s module on batches like ``images``; ``blocked``: a reason against the ConvNet's;
    ``image``: (C, H, W) where an augmentation changes their size. What the precision "auto" is, is decided here.

    Raises ``ValueError`` with the reason where ``engine="student"`` is not possible.
    """
    check_choice("engine", engine, ("auto", "student", "compiled", "generic"))
    if output is not None and output != "any":
        check_whole("output", output)
    to = resolved(precision, images.device, images.dtype)
    if precision not in ("auto", "bf16") and torch.is_autocast_enabled(images.device.type):
        raise ValueError(f"precision: expected 'auto' or 'bf16' under autocast, got {precision!r}")
    if engine in ("auto", "student"):
        if torch.is_autocast_enabled(images.device.type):
            blocked = blocked or "autocast is on; precision='bf16' is the engine's own way"
        try:
            if blocked is not None:
                raise Unrecognised(blocked)
            shape = recognised(flat, tuple(image or images.shape[-3:]), images.dtype, images.device, output)
            _log.debug("student engine: %s", shape)
            kept = KeptStatistics(flat.net) if shape.norm in ("batch", "running") else None
            return ConvNetStudents(shape, label_kind, largest_label, to, kept)
        except Unrecognised as reason:
            if engine == "student":
                raise ValueError(f"engine: expected a net that the student engine can run, but {reason}") from None
            _log.debug("generic engine: %s; engine='compiled' compiles its steps, which 'auto' never does", reason)
    element = None if output == "any" else output
    if engine == "compiled":
        if blocked is not None:
            raise ValueError(f"engine: expected another than 'compiled' here: {blocked}")
        check_switches(to, images.device, images.dtype, "which the compiled engine follows")
        return CompiledStudents(flat, label_kind, element, largest_label, to)
    return GenericStudents(flat, label_kind, element, largest_label, to)
