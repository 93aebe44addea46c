"""One training step of E ConvNet students, first and second order, without an autograd graph.

The students have one structure, `ConvNetShape`, and parameters theta ``[E, P]``. Their loss is the mean cross entropy
over N images. Three functions of theta: the logits; the loss and its gradient g; and, along a direction nu, the
derivatives of <g, nu>: what the adjoint of a training trajectory needs from a step (forward over reverse: Pearlmutter,
Neural Computation 1994; in trajectory matching: Deng & Russakovsky, NeurIPS 2022).

On the CPU one kernel takes a few images at a time through all layers and back (csrc/kernels/convnet_step.h). On CUDA
devices the same formulas run layer by layer, captured in CUDA graphs, once for a process and signature.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops import _convnet_step_layers as layers
from pydistill.ops._convnet_step_checks import BACKENDS, KINDS, check_statistics, check_step, mask_of, refuse_cuda
from pydistill.ops._convnet_step_graph import StepGraphs
from pydistill.ops._convnet_step_layers import LabelKind
from pydistill.ops._precision import Precision, Resolved, rounded
from pydistill.ops.attention_map import Axis
from pydistill.reference.convnet_shape import Activation, ConvNetShape, Norm, Pool

__all__ = [
    "BACKENDS",
    "ConvNetShape",
    "Workspace",
    "convnet_features",
    "convnet_features_backward",
    "convnet_gradient",
    "convnet_logits",
    "convnet_tangent",
    "tape_bytes",
    "workspace_bytes",
]


Form = Literal["logits", "gradient", "tangent", "features", "features_backward"]

_FORMS = ("logits", "gradient", "tangent", "features", "features_backward")  # in the order of ConvNetStep::Form
_OPS = torch.ops.pydistill


class Workspace:
    """The working memory of steps, allocated by the first and reused by all later ones: mapping fresh pages costs
    several times as much as a kernel's work on them. For one thread at a time; a workspace serves any shapes. Up to
    256 MiB stay allocated for the next workspace. On CUDA, steps with a workspace run as CUDA graphs, of which
    `pydistill.trajectory.release_graphs` tells."""

    KEPT = 256 << 20  # bytes
    _idle: ClassVar[list[Tensor]] = []  # at most one: the largest block that workspaces have left

    def __init__(self) -> None:
        self._own: list[Tensor] = []  # one block, or none yet
        self.graphs = StepGraphs()
        weakref.finalize(self, self._hand_on, self._own).atexit = False

    def at_least(self, size: int) -> Tensor:
        """uint8, of ``size`` bytes or more, contents undefined."""
        if not self._own or len(self._own[0]) < size:
            self._own.clear()  # frees the old one first
            with contextlib.suppress(IndexError):  # of pop
                self._own.append(self._idle.pop())
            if not self._own or len(self._own[0]) < size:
                self._own.clear()
                self._own.append(torch.empty(size, dtype=torch.uint8, device="cpu"))
        return self._own[0]

    @classmethod
    def _hand_on(cls, own: list[Tensor]) -> None:
        if own and len(own[0]) <= cls.KEPT and not (cls._idle and len(cls._idle[0]) > len(own[0])):
            cls._idle[:] = own


def convnet_logits(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    *,
    precision: Precision = "auto",
    running: Tensor | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> Tensor:
    """The students' logits.

    Equivalent to ``torch.stack([functional_call(net, unflatten(theta[e]), (images,)) for e in range(E)])`` with ``net``
    a `pydistill.nn.ConvNet`. Arguments and errors are those of `convnet_gradient`; not differentiable by autograd.

    Returns:
        ``[E, N, classes]``, dtype of theta.
    """
    chosen, to = check_step(shape, theta, images, precision, backend)
    check_statistics(shape, theta, running, None)
    if chosen == "reference":
        with rounded(to, theta.device):
            return reference.convnet_logits(shape, theta, images, running)
    if chosen == "cuda":
        return layers.logits(shape, theta, images, precision=to)
    memory = _memory(workspace, shape, "logits", theta, images, to)
    numbers = (shape.eps, shape.slope, to == "bf16")
    return _OPS.convnet_step_logits(theta.contiguous(), images.contiguous(), _sizes(shape), running, *numbers, memory)


def convnet_gradient(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    label_kind: LabelKind = "hard",
    precision: Precision = "auto",
    running: Tensor | None = None,
    statistics: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | list[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of each student and its gradient in the parameters.

    Equivalent to ``loss = F.cross_entropy(net(images), labels)`` and ``torch.autograd.grad(loss, theta)`` for every
    student's theta, with ``net`` a `pydistill.nn.ConvNet`. Not differentiable by autograd. Equal bits across runs and
    thread counts; the last bits depend on the instruction set and on E. On CUDA, equal bits across runs on one model of
    GPU with one set of libraries: cuDNN may take deterministic algorithms alone while a step runs, and times none,
    whatever ``torch.backends.cudnn`` says; autocast is off.

    In float32 on the CPU, convolutions after the first use Winograd's F(4x4, 3x3) with well-chosen points: a layer's
    relative error is about that of a direct convolution (7e-7 against 6e-7 with 128 channels).

    Args:
        shape: the net.
        theta: ``[E, P]``, float32 or float64, students' parameters in ``net.parameters()`` order.
        images: ``[N, C, H, W]``, shared by the students, or ``[E, N, C, H, W]``; dtype and device of theta.
        labels: int64 ``[N]`` or ``[E, N]`` for "hard"; floating ``[N, K]`` or ``[E, N, K]`` for "logits" (a softmax is
            taken) and "probs".
        label_kind: what ``labels`` holds.
        precision: "ieee" (formerly "fp32"): everything in theta's dtype, whatever torch's switches say. "tf32" (theta
            float32, CUDA): factors of convolutions and of the classifier are rounded to TF32; "tf32-conv",
            "tf32-matmul": those of convolutions, or of the classifier, alone. "bf16" (theta float32): the
            convolutions' factors are rounded to bfloat16, except in the pass that decides which ReLUs are open,
            and in the first layer's outputs; sums, statistics, parameters, classifier and loss are float32. "auto": on
            CUDA that of these which torch's switches now ask for (``torch.backends.cudnn.conv.fp32_precision`` and
            ``cuda.matmul``'s, or their older ``allow_tf32``): "tf32-conv" unless they were changed; else "ieee".
        running: ``[2, sum of widths]``, or with E in front, dtype of theta: the means and variances side by side,
            for the norm "running" only. Constants.
        statistics: ``[E, 2, sum of widths]``, dtype of theta: receives the means and biased variances of the batch that
            the norm "batch" has used, in that order.
        workspace: working memory to reuse; fresh when None.
        tape: uint8, `tape_bytes` long, 64-byte aligned: receives what `convnet_tangent` would otherwise recompute, in
            theta's dtype or, for precision "bf16", in bfloat16. On CUDA a list, whose elements are replaced.
        backend: "auto" (the device's), "reference" (autograd on plain torch), "cpu" or "cuda".

    Returns:
        loss ``[E]`` and its gradient ``[E, P]``, dtype of theta.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend cannot run here.
        RuntimeError: an argument requires a gradient, and grad mode is on.
    """
    chosen, to = check_step(shape, theta, images, precision, backend, labels, label_kind, tape)
    check_statistics(shape, theta, running, statistics)
    if chosen == "reference":
        with rounded(to, theta.device):
            return reference.convnet_gradient(shape, theta, images, labels, label_kind, running, statistics)
    if chosen == "cuda":
        run = workspace.graphs.gradient if workspace else layers.gradient
        keep = tape is not None
        loss, grad, *kept = run(shape, theta, images, labels, label_kind=label_kind, precision=to, keep=keep)
        if isinstance(tape, list):
            tape[:] = kept
        return loss, grad
    memory = _memory(workspace, shape, "gradient", theta, images, to)
    return _OPS.convnet_step_gradient(
        theta.contiguous(),
        images.contiguous(),
        labels.contiguous(),
        _sizes(shape),
        running,
        statistics,
        shape.eps,
        shape.slope,
        KINDS.index(label_kind),
        to == "bf16",
        memory,
        tape,
    )


def convnet_tangent(
    shape: ConvNetShape,
    theta: Tensor,
    direction: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    label_kind: LabelKind = "hard",
    precision: Precision = "auto",
    curvature: bool = True,
    scale: Tensor | None = None,
    running: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | list[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The derivatives of <g, direction>, with g the gradient of the loss: a step of a trajectory's adjoint.

    Equivalent, for every student, to ``(g,) = torch.autograd.grad(loss, theta, create_graph=True)`` and
    ``torch.autograd.grad((g * direction).sum(), (theta, images, labels))``. Other arguments, errors and guarantees are
    those of `convnet_gradient`.

    Args:
        direction: ``[E, P]``.
        curvature: False omits the second result and, on the CPU, its work.
        scale: ``[E]``, dtype of theta: a factor on all results but the slope; None: one.
        tape: as filled by `convnet_gradient` for the same theta, images, labels, kind and precision. A tensor is
            overwritten.

    Returns:
        slope: ``[E]``, <g, direction> itself.
        curvature: ``[E, P]``, the loss's Hessian times direction.
        images_grad: ``[E, N, C, H, W]``, per student even if the images are shared.
        labels_grad: ``[E, N, K]``, None for hard labels.
    """
    chosen, to = check_step(shape, theta, images, precision, backend, labels, label_kind, tape)
    if direction.shape != theta.shape or direction.dtype != theta.dtype or direction.device != theta.device:
        wanted, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (theta, direction))
        raise ValueError(f"direction: expected {wanted} as theta, got {got}")
    if scale is not None and (scale.shape != theta.shape[:1] or scale.dtype != theta.dtype):
        raise ValueError(f"scale: expected {theta.dtype} [{len(theta)}], got {scale.dtype} {list(scale.shape)}")
    check_statistics(shape, theta, running, None)
    if chosen == "cpu":
        memory = _memory(workspace, shape, "tangent", theta, images, to)
        slope, grad, images_grad, labels_grad = _OPS.convnet_step_tangent(
            theta.contiguous(),
            direction.contiguous(),
            images.contiguous(),
            labels.contiguous(),
            _sizes(shape),
            running,
            shape.eps,
            shape.slope,
            KINDS.index(label_kind),
            to == "bf16",
            curvature,
            theta.new_ones(len(theta)) if scale is None else scale.contiguous(),
            memory,
            tape,
        )
        return slope, grad if curvature else None, images_grad, None if label_kind == "hard" else labels_grad
    if chosen == "reference":
        with rounded(to, theta.device):
            found = reference.convnet_tangent(shape, theta, direction, images, labels, label_kind, running)
    else:
        run = workspace.graphs.tangent if workspace else layers.tangent
        batch = (images, labels, *(tape or ()))
        found = run(shape, theta, direction, *batch, label_kind=label_kind, precision=to)
    slope, grad, images_grad, labels_grad = found
    if scale is not None:
        grad, images_grad = grad * scale[:, None], images_grad * scale.view(-1, 1, 1, 1, 1)
        labels_grad = None if labels_grad is None else labels_grad * scale.view(-1, 1, 1)
    return slope, grad if curvature else None, images_grad, labels_grad


def convnet_features(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    *,
    p: float = 4.0,
    attended: Sequence[int] = (),
    axis: Axis = "spatial",
    precision: Precision = "auto",
    running: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention maps of the blocks' activations and the embedding after the last, without writing any activation.

    Equivalent, with a_l the activation of block l before its pool, to ``a_l.abs().pow(p).sum(1).flatten(1)`` for every
    attended block side by side, ``a_l.abs().pow(p).sum((2, 3))`` likewise, and `pydistill.nn.ConvNet.embed`: what
    DataDAM (Sajedi et al., ICCV 2023), ATOM and DM match. Not differentiable by autograd; `convnet_features_backward`
    is its adjoint and `pydistill.matching.features` combines the two. Other arguments, errors and guarantees are
    those of `convnet_gradient`; with precision "bf16" the forward factors are rounded once, not kept as a sum of two.

    Args:
        p: the power, above zero.
        attended: blocks, from 0, whose maps are wanted, ascending.
        axis: "spatial", "channel" or "both".
        tape: as in `convnet_gradient`: receives what `convnet_features_backward` would otherwise recompute.
        backend: "auto" (the device's), "reference" or "cpu".

    Returns:
        spatial maps ``[E, N, sum of H_l W_l]``, channel maps ``[E, N, sum of C_l]`` (each without elements if not asked
        for) and embedding ``[E, N, F]``; dtype of theta.
    """
    chosen, to = check_step(shape, theta, images, precision, backend, tape=tape)
    mask = mask_of(shape, p, attended, axis)
    check_statistics(shape, theta, running, None)
    if chosen == "reference":
        with rounded(to, theta.device):
            return reference.convnet_features(shape, theta, images, p, attended, axis, running)
    refuse_cuda(chosen)
    kept: Form = "features" if tape is None else "features_backward"  # what a backward pass needs is kept, too
    memory = _memory(workspace, shape, kept, theta, images, to)
    options = (running, shape.eps, shape.slope, to == "bf16", p, mask)
    wanted = (axis != "channel", axis != "spatial")
    return _OPS.convnet_step_features(
        theta.contiguous(), images.contiguous(), _sizes(shape), *options, *wanted, memory, tape
    )


def convnet_features_backward(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    spatial_grad: Tensor | None,
    channel_grad: Tensor | None,
    embedding_grad: Tensor | None,
    *,
    p: float = 4.0,
    attended: Sequence[int] = (),
    precision: Precision = "auto",
    running: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient of `convnet_features` with respect to the images, from the gradients of its results.

    Equivalent to ``torch.autograd.grad(features, images, grads)`` for every student. Without a tape, activations are
    recomputed, a few images at a time. Other arguments, errors and guarantees are those of `convnet_features`.

    Args:
        spatial_grad, channel_grad, embedding_grad: shaped as the results of `convnet_features`, or None: zero.
        tape: as filled by `convnet_features` for the same theta, images and precision; it can be used any number of
            times.

    Returns:
        ``[E, N, C, H, W]``, per student even if the images are shared.
    """
    chosen, to = check_step(shape, theta, images, precision, backend, tape=tape)
    check_statistics(shape, theta, running, None)
    mask = mask_of(shape, p, attended, "both")
    grads = (spatial_grad, channel_grad, embedding_grad)
    layers = [shape.layers[block] for block in attended]
    rows = (sum(at.height * at.width for at in layers), sum(at.out_channels for at in layers), shape.features)
    for name, grad, row in zip(("spatial_grad", "channel_grad", "embedding_grad"), grads, rows, strict=True):
        expected = (len(theta), images.shape[-4], row)
        if grad is not None and (grad.shape != expected or grad.dtype != theta.dtype):
            raise ValueError(f"{name}: expected {theta.dtype} {list(expected)}, got {grad.dtype} {list(grad.shape)}")
    if chosen == "reference":
        own = images.expand(len(theta), *images.shape[-4:]).detach().requires_grad_()
        with torch.enable_grad(), rounded(to, theta.device):
            outputs = reference.convnet_features(shape, theta.detach(), own, p, attended, "both", running)
            total = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True) if grad is not None)
            return torch.autograd.grad(total + 0 * own.sum(), own)[0]
    refuse_cuda(chosen)
    memory = _memory(workspace, shape, "features_backward", theta, images, to)
    return _OPS.convnet_step_features_backward(
        *(None if grad is None else grad.contiguous() for grad in grads),
        *(theta.contiguous(), images.contiguous(), _sizes(shape)),
        *(running, shape.eps, shape.slope, to == "bf16", p, mask, memory, tape),
    )


def workspace_bytes(
    shape: ConvNetShape, form: Form, students: int, images: int, dtype: torch.dtype, precision: Resolved = "ieee"
) -> int:
    """The working memory of a step on the CPU, the threads' own included."""
    shared, _, own = _bytes(shape, form, students, images, dtype, precision)
    return shared + own * torch.get_num_threads()


def tape_bytes(
    shape: ConvNetShape, students: int, images: int, dtype: torch.dtype, precision: Resolved = "ieee"
) -> int:
    """The size of the tape of one step on the CPU, rounded up so that another may follow it."""
    size = _bytes(shape, "gradient", students, images, dtype, precision)[1] * students * images
    return (size + 63) // 64 * 64


@lru_cache(maxsize=64)
def _bytes(
    shape: ConvNetShape, form: Form, students: int, images: int, dtype: torch.dtype, precision: Resolved
) -> tuple[int, ...]:
    """Bytes for all threads together, for the tape of an image, for each thread."""
    double, half = dtype == torch.float64, precision == "bf16"
    return tuple(_OPS.convnet_step_bytes(_sizes(shape), _FORMS.index(form), students, images, double, half).tolist())


def _memory(
    workspace: Workspace | None, shape: ConvNetShape, form: Form, theta: Tensor, images: Tensor, precision: Resolved
) -> Tensor:
    size = _bytes(shape, form, len(theta), images.shape[-4], theta.dtype, precision)[0]
    return (workspace or Workspace()).at_least(size)


@lru_cache(maxsize=64)
def _sizes(shape: ConvNetShape) -> Tensor:
    sizes = (shape.channels, shape.height, shape.width_px, shape.first_padding, shape.classes)
    kinds = [(Norm, shape.norm), (Activation, shape.activation), (Pool, shape.pool)]
    norm, activation, pool = (get_args(known).index(kind) for known, kind in kinds)
    block = (norm, shape.groups, activation, pool, shape.biased)
    return torch.tensor((*sizes, *block, *shape.widths), dtype=torch.int64, device="cpu")
