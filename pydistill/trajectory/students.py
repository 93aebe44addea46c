"""How students take a step: by autograd through any module, or on the hand-written step where the module is a ConvNet.

Both answer the same two questions about a step of E students at theta ``[E, P]``: the gradient g of each student's loss
(`gradient`), and the derivatives of <g, direction> (`adjoint`).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill import _library
from pydistill.nn import Conv2d, ConvNet, InstanceNormReLUAvgPool
from pydistill.ops.attention_map import Axis
from pydistill.ops.convnet_step import (
    ConvNetShape,
    LabelKind,
    Precision,
    Workspace,
    convnet_features,
    convnet_features_backward,
    convnet_gradient,
    convnet_logits,
    convnet_tangent,
    tape_bytes,
    workspace_bytes,
)
from pydistill.trajectory.flat import FlatModule

Engine = Literal["auto", "student", "generic"]

_log = logging.getLogger("pydistill")
_EPS = 1e-5
_MAX_DEPTH = 8  # of the compiled step
_MAX_AGREED = 64

# foreign modules that gave the engine's logits, as all that their forward can depend on beside their parameters
_agreed: set[tuple] = set()


class Batch(NamedTuple):
    """One step's images and labels, each with a leading [E] where students have their own."""

    images: Tensor  # [B, C, H, W] or [E, B, C, H, W]
    labels: Tensor  # [B] or [B, K], or with [E] in front
    per_student: bool  # whether labels has [E] in front


class Descent(NamedTuple):
    """What a step needs to know: each student's loss and its gradient, and the logits where they were asked for."""

    losses: Tensor  # [E]
    grad: Tensor  # [E, P]
    logits: Tensor | None  # [E, B, K]


class Adjoint(NamedTuple):
    """What <g, direction> is and scale [E] times how it changes; a field is None where it was not asked for."""

    slope: Tensor  # [E]: <g, direction>
    curvature: Tensor | None  # [E, P]: along theta
    images: Tensor | None  # [E, B, C, H, W]
    labels: Tensor | None  # [E, B, K]


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

    def _logits(self, theta: Tensor, x: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        half = self.precision == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext():
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


class ConvNetStudents:
    """ConvNets, all students at once, on `pydistill.ops.convnet_step`.

    Steps at the end keep their tapes, as many as a budget allows, so that the reverse sweep need not run them again.
    """

    AUTO = 256 << 20  # bytes of tapes that memory="auto" allows

    _idle: ClassVar[list[Tensor]] = []  # at most one: the tapes' memory that an unroll has left to the next

    def __init__(self, shape: ConvNetShape, label_kind: LabelKind, largest_label: int, precision: Precision):
        self.shape, self.label_kind, self.precision = shape, label_kind, precision
        self.largest_label = largest_label
        self.workspace = Workspace()
        self.tapes: dict[int, Tensor] = {}
        self._first_kept, self._tapes_bytes = 0, 0
        self._memory: Tensor | None = None  # of the tapes

    def plan(
        self, memory: Literal["auto"] | int, steps: int, students: int, images: int, theta: Tensor, stored: int
    ) -> None:
        """Decide which steps keep their tape within ``memory``; ``stored``: what the unroll keeps of parameters."""
        if theta.device.type != "cpu":
            if memory != "auto":
                raise ValueError(
                    f"memory: expected 'auto' on {theta.device.type}, where steps keep nothing, got {memory}"
                )
            self._first_kept = steps
            return
        size = tape_bytes(self.shape, students, images, theta.dtype, self.precision)
        least = stored + workspace_bytes(self.shape, "tangent", students, images, theta.dtype, self.precision)
        if memory == "auto":
            room = self.AUTO
        else:
            room = memory - least
            if room < 0:
                raise ValueError(f"memory: expected at least {least} bytes for this unroll, got {memory}")
        self._first_kept = max(0, steps - room // size)  # the reverse sweep starts at the end
        self._tapes_bytes, self._memory = (steps - self._first_kept) * size, None

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """[E, B, K]."""
        with torch.no_grad():
            return convnet_logits(self.shape, theta, images, precision=self.precision, workspace=self.workspace)

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
            size = tape_bytes(self.shape, len(theta), batch.images.shape[-4], theta.dtype, self.precision)
            if len(self._tape_memory()) >= size:  # an augmentation of which nothing is known may have made more images
                tape = self.tapes[keep] = self._memory[:size]
                self._memory = self._memory[size:]
        logits = self.logits(theta, batch.images) if with_logits else None
        with torch.no_grad():
            losses, grad = convnet_gradient(
                self.shape,
                theta,
                batch.images,
                batch.labels,
                label_kind=self.label_kind,
                precision=self.precision,
                workspace=self.workspace,
                tape=tape,
            )
        return Descent(losses, grad, logits)

    def features(
        self, theta: Tensor, images: Tensor, p: float, attended: Sequence[int], axis: Axis, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `convnet_features`; ``keep``: what `features_backward` will ask for, within the budget."""
        tape = None
        if keep:
            self.plan("auto", 1, len(theta), images.shape[-4], theta, 0)
            if self._first_kept == 0:
                tape = self.tapes[0] = self._tape_memory()[: self._tapes_bytes]
        options = {"precision": self.precision, "workspace": self.workspace, "tape": tape}
        with torch.no_grad():
            return convnet_features(self.shape, theta, images, p=p, attended=attended, axis=axis, **options)

    def features_backward(
        self, theta: Tensor, images: Tensor, grads: Sequence[Tensor | None], p: float, attended: Sequence[int]
    ) -> Tensor:
        """[E, N, C, H, W], from the gradients of what `features` gave."""
        options = {"precision": self.precision, "workspace": self.workspace, "tape": self.tapes.get(0)}
        with torch.no_grad():
            return convnet_features_backward(self.shape, theta, images, *grads, p=p, attended=attended, **options)

    def _tape_memory(self) -> Tensor:
        """What is left of it. Freshly mapped pages cost more than a small step's tape is worth: they are handed on."""
        if self._memory is None:
            try:
                block = self._idle.pop()
            except IndexError:
                block = torch.empty(0, dtype=torch.uint8, device="cpu")
            if len(block) < self._tapes_bytes:
                block = torch.empty(self._tapes_bytes, dtype=torch.uint8, device="cpu")
            self._memory = block
            if len(block) <= self.AUTO:
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
                    workspace=self.workspace,
                    tape=self.tapes.pop(kept, None),
                )
            )
        return found._replace(images=found.images if images else None, labels=found.labels if labels else None)


def of_student(batch: Batch, e: int) -> tuple[Tensor, Tensor]:
    x = batch.images[e] if batch.images.dim() == 5 else batch.images
    return x, batch.labels[e] if batch.per_student else batch.labels


def check_classes(label_kind: str, largest_label: int, labels: Tensor, classes: int) -> None:
    if label_kind == "hard":
        if largest_label >= classes:
            raise ValueError(f"labels: expected class numbers below the net's {classes} classes, got {largest_label}")
    elif labels.shape[-1] != classes:
        raise ValueError(f"labels: expected [N, {classes}] for the net's classes, got [N, {labels.shape[-1]}]")


def choose_students(
    engine: Engine,
    flat: FlatModule,
    images: Tensor,
    label_kind: LabelKind,
    output: int | None,
    largest_label: int,
    precision: Precision,
    blocked: str | None = None,
) -> GenericStudents | ConvNetStudents:
    """The engine that runs ``flat``'s module on batches like ``images``; ``blocked``: a reason against the ConvNet's.

    Raises ``ValueError`` with the reason where ``engine="student"`` cannot be had.
    """
    if engine not in ("auto", "student", "generic"):
        raise ValueError(f"engine: expected 'auto', 'student' or 'generic', got {engine!r}")
    if precision not in ("fp32", "tf32", "bf16"):
        raise ValueError(f"precision: expected 'fp32', 'tf32' or 'bf16', got {precision!r}")
    if precision != "fp32" and images.dtype != torch.float32:
        raise TypeError(f"precision: expected float32 images and theta0 for {precision!r}, got {images.dtype}")
    if precision == "tf32" and images.device.type != "cuda":
        raise ValueError(f"precision: expected 'fp32' or 'bf16' on {images.device.type}, got 'tf32'")
    if engine != "generic":
        if output is not None:
            blocked = blocked or f"output={output} takes an element of a tuple"
        if torch.is_autocast_enabled(images.device.type):
            blocked = blocked or "autocast is on; precision='bf16' is the engine's own way"
        found = blocked or convnet_shape(flat.net, tuple(images.shape[-3:]), images.dtype, images.device)
        if isinstance(found, ConvNetShape):
            _log.debug("student engine: %s", found)
            return ConvNetStudents(found, label_kind, largest_label, precision)
        if engine == "student":
            raise ValueError(f"engine: expected a net that the student engine can run, but {found}")
        _log.debug("generic engine: %s", found)
    if precision == "tf32":
        raise ValueError("precision: 'tf32' is the student engine's; others do as torch.backends says")
    return GenericStudents(flat, label_kind, output, largest_label, precision)


def trains_at_once(net: nn.Module, images: Tensor) -> bool:
    """Whether students like ``net`` train on ``images`` at once: then they share all but parameters and data."""
    return isinstance(convnet_shape(net, images.shape[-3:], images.dtype, images.device), ConvNetShape)


def convnet_shape(
    net: nn.Module, image: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ConvNetShape | str:
    """The shape of ``net`` as a ConvNet of the student engine on images ``[C, H, W]``, or why it is none.

    The family: ``features``, an ``nn.Sequential`` of blocks 3x3 convolution with bias (padding 1, in the first block
    any), ``GroupNorm(C, C)`` (eps 1e-5, affine), ReLU, 2x2 average pool, possibly run through
    `pydistill.nn.accelerate`; then ``classifier``, an ``nn.Linear`` of the flattened features. A module of another
    class than `pydistill.nn.ConvNet` also has to give the engine's logits on a few random images; one that has done so
    answers for all of its class with the same layers and the same numbers and strings as attributes.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"there is no student engine on {device.type}"
    if device.type == "cuda" and (missing := _library.unavailable("cuda")):
        return f"the student engine's CUDA kernels cannot run: {missing}"
    if dtype not in (torch.float32, torch.float64):
        return f"the student engine computes in float32 and float64, not {dtype}"
    features, classifier = getattr(net, "features", None), getattr(net, "classifier", None)
    if type(features) is not nn.Sequential or type(classifier) is not nn.Linear:
        return "it has no nn.Sequential `features` followed by an nn.Linear `classifier`"
    for module in net.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return f"{type(module).__name__} has hooks"
    blocks = _blocks([layer for layer in features if type(layer) is not nn.Identity])
    if isinstance(blocks, str):
        return blocks
    if not blocks or len(blocks) > _MAX_DEPTH:
        return f"it has {len(blocks)} blocks, not 1 to {_MAX_DEPTH}"
    if classifier.bias is None:
        return "its classifier has no bias"
    parameters = [p for conv, norm in blocks for p in (conv.weight, conv.bias, norm.weight, norm.bias)]
    parameters += [classifier.weight, classifier.bias]
    own = list(net.parameters())
    if len(own) != len(parameters) or any(a is not b for a, b in zip(own, parameters, strict=True)):
        return "it has other parameters, or in another order, than its features and its classifier"
    if next(net.buffers(), None) is not None:
        return "it has buffers"
    try:
        shape = ConvNetShape(
            *image,
            tuple(conv.out_channels for conv, _ in blocks),
            blocks[0][0].padding[0],
            classifier.out_features,
            _EPS,
        )
    except ValueError as error:
        return str(error)
    channels = [image[0], *shape.widths]
    for i, (conv, _) in enumerate(blocks):
        if conv.in_channels != channels[i]:
            return f"its convolution {i} takes {conv.in_channels} channels, not {channels[i]}"
    if classifier.in_features != shape.features:
        return (
            f"its classifier takes {classifier.in_features} features where {list(image)} images give {shape.features}"
        )
    if type(net) is not ConvNet:
        own = {name: value for name, value in vars(net).items() if not name.startswith("_")}
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in own.values())
        kind = (type(net), type(net).forward, repr(net), tuple(own.items()), shape, dtype, device) if plain else None
        if kind is None or kind not in _agreed:
            if not _same_logits(net, shape):
                return f"{type(net).__name__}.forward computes something else than classifier(flatten(features(x)))"
            if len(_agreed) == _MAX_AGREED:
                _agreed.clear()
            if kind is not None:
                _agreed.add(kind)
    return shape


def _blocks(layers: list[nn.Module]) -> list[tuple[nn.Conv2d, nn.Module]] | str:
    blocks = []
    while layers:
        conv, norm, *layers = layers if len(layers) > 1 else (*layers, None)
        i = len(blocks)
        if type(conv) not in (nn.Conv2d, Conv2d):
            return f"block {i} begins with {type(conv).__name__}, not Conv2d"
        kinds = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        padding = conv.padding if i == 0 else (1, 1)
        if kinds != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding != padding or padding[0] != padding[-1]:
            return f"block {i} has {conv}, not a plain 3x3 convolution with padding 1"
        if conv.bias is None:
            return f"block {i}'s convolution has no bias"
        if isinstance(norm, InstanceNormReLUAvgPool):
            if not (norm.relu and norm.pool and norm.eps == _EPS):
                return f"block {i} has {norm}, not one with ReLU, pool and eps={_EPS}"
        else:
            plain = type(norm) is nn.GroupNorm and norm.num_groups == norm.num_channels and norm.affine
            if not plain or norm.eps != _EPS:
                return f"block {i} has {norm}, not GroupNorm(C, C) with eps={_EPS}"
            relu, pool, *layers = layers if len(layers) > 1 else (*layers, None, None)
            if type(relu) is not nn.ReLU:
                return f"block {i} has {relu}, not ReLU"
            settings = [getattr(pool, name, None) for name in ("kernel_size", "stride", "padding")]
            settings = [(v, v) if isinstance(v, int) else v for v in settings]
            plain = type(pool) is nn.AvgPool2d and not pool.ceil_mode and pool.divisor_override is None
            if not plain or settings != [(2, 2), (2, 2), (0, 0)]:
                return f"block {i} has {pool}, not AvgPool2d(2)"
        blocks.append((conv, norm))
    return blocks


def _same_logits(net: nn.Module, shape: ConvNetShape) -> bool:
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, shape.channels, shape.height, shape.width_px, generator=generator).to(parameter)
    with torch.no_grad(), torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        theta = torch.cat([p.flatten() for p in net.parameters()])[None]
        if theta.dtype not in (torch.float32, torch.float64):
            return False
        try:
            theirs = net(images)
        except Exception as error:
            _log.debug("net: its forward raised %r on random images", error)
            return False
        ours = convnet_logits(shape, theta, images)[0]
    tolerance = 1e-3 if theta.dtype == torch.float32 else 1e-8
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and bool((theirs - ours).norm() <= tolerance * (1 + ours.norm()))
    )
