"""Students that are any module: a step by autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.ops.convnet_step import LabelKind, Precision
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.step import Adjoint, Batch, Descent, check_classes, of_student


class GenericStudents:
    """Any module, by autograd, one student after the other."""

    def __init__(
        self, flat: FlatModule, label_kind: LabelKind, output: int | None, largest_label: int, precision: Precision
    ):
        self.flat, self.label_kind, self.output = flat, label_kind, output
        self.largest_label, self.precision = largest_label, precision

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """[E, B, K], with the module in the mode it is in."""
        rows = images if images.dim() == 5 else [images] * len(theta)
        return torch.stack([self._logits(row, x) for row, x in zip(theta, rows, strict=True)])

    def in_evaluation(self) -> GenericStudents:
        """The same students: they go by the mode that the module is in."""
        return self

    def _logits(self, theta: Tensor, x: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        return self._checked(lambda: self.flat(theta, x, buffers=buffers), x)

    def _checked(self, forward: Callable[[], Any], x: Tensor) -> Tensor:
        """What the net's ``forward`` of x gives, as logits."""
        half = self.precision == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext():
            logits = forward()
        if self.output is not None:
            logits = logits[self.output]
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"net: its forward returned a {type(logits).__name__}, expected a tensor of logits; "
                "output=i takes element i of a tuple"
            )
        if logits.dim() != 2 or len(logits) != len(x):
            raise ValueError(f"net: expected logits [{len(x)}, K], got shape {list(logits.shape)}")
        return logits.float() if half else logits

    def loss(self, theta: Tensor, x: Tensor, y: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """One student's: theta [P], x [B, C, H, W]."""
        return self._loss(self._logits(theta, x, buffers), y)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        check_classes(self.label_kind, self.largest_label, y, logits.shape[1])
        return F.cross_entropy(logits, y.softmax(-1) if self.label_kind == "logits" else y)

    def gradient(
        self,
        theta: Tensor,
        batch: Batch,
        buffers: dict[str, Tensor] | None,
        keep: int | None,
        *,
        with_logits: bool = False,
    ) -> Descent:
        found = []
        for e, row in enumerate(theta):
            with torch.enable_grad():
                row = row.detach().requires_grad_()
                x, y = of_student(batch, e)
                logits = self._logits(row, x.detach(), buffers)
                loss = self._loss(logits, y.detach())
                found.append((loss.detach(), torch.autograd.grad(loss, row)[0], logits.detach()))
        losses, grads, logits = zip(*found, strict=True)
        return Descent(torch.stack(losses), torch.stack(grads), torch.stack(logits) if with_logits else None)

    def penalty_gradient(self, theta: Tensor, images: Tensor, buffers: dict[str, Tensor] | None) -> Tensor:
        """[E, P]: gradient of mean((||d sum(logits) / d images||_2 over channels - 1)^2); images [E, B, C, H, W]."""
        found = []
        for row, x in zip(theta, images, strict=True):
            with torch.enable_grad():
                row, x = row.detach().requires_grad_(), x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._logits(row, x, buffers).sum(), x, create_graph=True)
                penalty = (torch.linalg.vector_norm(slope, dim=1) - 1).square().mean()
                curved = penalty.requires_grad  # not where the slope is the same at every theta
                found += (
                    torch.autograd.grad(penalty, row, materialize_grads=True) if curved else [torch.zeros_like(row)]
                )
        return torch.stack(found)

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
        found = []
        for e, row in enumerate(theta):
            with torch.enable_grad():
                row = row.detach().requires_grad_()
                x, y = (t.detach() for t in of_student(batch, e))
                x.requires_grad_(images)
                if labels:
                    y.requires_grad_()
                (g,) = torch.autograd.grad(self.loss(row, x, y, buffers), row, create_graph=True)
                wanted = {"curvature": row} if curvature else {}
                wanted |= {"images": x} if images else {}
                wanted |= {"labels": y} if labels else {}
                if wanted and g.requires_grad:
                    parts = torch.autograd.grad(
                        g, list(wanted.values()), direction[e], allow_unused=True, materialize_grads=True
                    )
                else:  # a loss linear in theta: nothing depends on anything
                    parts = tuple(torch.zeros_like(t) for t in wanted.values())
                parts = [part * scale[e] for part in parts]
            found.append({"slope": torch.dot(g.detach(), direction[e]), **dict(zip(wanted, parts, strict=True))})
        joined = {name: torch.stack([f[name] for f in found]) for name in found[0]}
        return Adjoint(**{name: joined.get(name) for name in Adjoint._fields})
