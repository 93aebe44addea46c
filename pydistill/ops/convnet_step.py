"""One training step of E ConvNet students, first and second order, without an autograd graph.

The students have one structure, `ConvNetShape`, and parameters theta ``[E, P]``. Their loss is the mean cross entropy
over N images. Three functions of theta: the logits; the loss and its gradient g; and, along a direction nu, the
derivatives of <g, nu>: what the adjoint of a training trajectory needs from a step (forward over reverse: Pearlmutter,
Neural Computation 1994; in trajectory matching: Deng & Russakovsky, NeurIPS 2022).

On the CPU one kernel takes a few images at a time through all layers and back (csrc/kernels/convnet_step.h). On CUDA
devices the same formulas run layer by layer, captured in CUDA graphs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pydistill import _library, reference
from pydistill.ops import _convnet_step_layers as layers
from pydistill.ops._convnet_step_graph import StepGraphs
from pydistill.ops._operator import choose_backend
from pydistill.ops.attention_map import AXES, Axis, check_power
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

BACKENDS = ("reference", "cpu", "cuda")

LabelKind = Literal["hard", "logits", "probs"]
Precision = Literal["fp32", "tf32", "bf16"]
Form = Literal["logits", "gradient", "tangent", "features", "features_backward"]

_FORMS = ("logits", "gradient", "tangent", "features", "features_backward")  # in the order of ConvNetStep::Form
_KINDS = ("hard", "logits", "probs")  # in the order of ConvNetStep::Labels
_OPS = torch.ops.pydistill
_passed: dict[tuple, str] = {}  # backends by the arguments' signatures


class Workspace:
    """The working memory of steps, allocated by the first and reused by all later ones: mapping fresh pages costs
    several times as much as a kernel's work on them. For one thread at a time; a workspace serves any shapes. Up to
    256 MiB stay allocated for the next workspace."""

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
    precision: Precision = "fp32",
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
    chosen = _check(shape, theta, images, precision, backend)
    _check_statistics(shape, theta, running, None)
    if chosen == "reference":
        return reference.convnet_logits(shape, theta, images, running)
    if chosen == "cuda":
        return layers.logits(shape, theta, images, precision=precision)
    memory = _memory(workspace, shape, "logits", theta, images, precision)
    numbers = (shape.eps, shape.slope, precision == "bf16")
    return _OPS.convnet_step_logits(theta.contiguous(), images.contiguous(), _sizes(shape), running, *numbers, memory)


def convnet_gradient(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    label_kind: LabelKind = "hard",
    precision: Precision = "fp32",
    running: Tensor | None = None,
    statistics: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of each student and its gradient in the parameters.

    Equivalent to ``loss = F.cross_entropy(net(images), labels)`` and ``torch.autograd.grad(loss, theta)`` for every
    student's theta, with ``net`` a `pydistill.nn.ConvNet`. Not differentiable by autograd. Equal bits across runs and
    thread counts; the last bits depend on the instruction set and on E.

    In float32 on the CPU, convolutions after the first use Winograd's F(4x4, 3x3) with well-chosen points: a layer's
    relative error is about that of a direct convolution (7e-7 against 6e-7 with 128 channels).

    Args:
        shape: the net.
        theta: ``[E, P]``, float32 or float64, students' parameters in ``net.parameters()`` order.
        images: ``[N, C, H, W]``, shared by the students, or ``[E, N, C, H, W]``; dtype and device of theta.
        labels: int64 ``[N]`` or ``[E, N]`` for "hard"; floating ``[N, K]`` or ``[E, N, K]`` for "logits" (a softmax is
            taken) and "probs".
        label_kind: what ``labels`` holds.
        precision: "fp32": everything in theta's dtype, regardless of torch's TF32 switches. "tf32" (theta float32,
            CUDA): factors of convolutions and of the classifier are rounded to TF32. "bf16" (theta float32): the
            convolutions' factors are rounded to bfloat16, except in the pass that decides which ReLUs are open,
            and in the first layer's outputs; sums, statistics, parameters, classifier and loss are float32.
        running: ``[2, sum of widths]``, or with E in front, dtype of theta: the means and variances side by side,
            for the norm "running" only. Constants.
        statistics: ``[E, 2, sum of widths]``, dtype of theta: receives the means and biased variances of the batch that
            the norm "batch" has used, in that order.
        workspace: working memory to reuse; fresh when None.
        tape: uint8, `tape_bytes` long, 64-byte aligned: receives what `convnet_tangent` would otherwise recompute, in
            theta's dtype or, for precision "bf16", in bfloat16. CPU.
        backend: "auto" (the device's), "reference" (autograd on plain torch), "cpu" or "cuda".

    Returns:
        loss ``[E]`` and its gradient ``[E, P]``, dtype of theta.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend cannot run here.
        RuntimeError: an argument requires a gradient, and grad mode is on.
    """
    chosen = _check(shape, theta, images, precision, backend, labels, label_kind, tape)
    _check_statistics(shape, theta, running, statistics)
    if chosen == "reference":
        return reference.convnet_gradient(shape, theta, images, labels, label_kind, running, statistics)
    if chosen == "cuda":
        run = workspace.graphs.gradient if workspace else layers.gradient
        return run(shape, theta, images, labels, label_kind=label_kind, precision=precision)
    memory = _memory(workspace, shape, "gradient", theta, images, precision)
    return _OPS.convnet_step_gradient(
        theta.contiguous(),
        images.contiguous(),
        labels.contiguous(),
        _sizes(shape),
        running,
        statistics,
        shape.eps,
        shape.slope,
        _KINDS.index(label_kind),
        precision == "bf16",
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
    precision: Precision = "fp32",
    curvature: bool = True,
    scale: Tensor | None = None,
    running: Tensor | None = None,
    workspace: Workspace | None = None,
    tape: Tensor | None = None,
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
        tape: as filled by `convnet_gradient` for the same theta, images, labels, kind and precision. It is overwritten.

    Returns:
        slope: ``[E]``, <g, direction> itself.
        curvature: ``[E, P]``, the loss's Hessian times direction.
        images_grad: ``[E, N, C, H, W]``, per student even if the images are shared.
        labels_grad: ``[E, N, K]``, None for hard labels.
    """
    chosen = _check(shape, theta, images, precision, backend, labels, label_kind, tape)
    if direction.shape != theta.shape or direction.dtype != theta.dtype or direction.device != theta.device:
        wanted, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (theta, direction))
        raise ValueError(f"direction: expected {wanted} as theta, got {got}")
    if scale is not None and (scale.shape != theta.shape[:1] or scale.dtype != theta.dtype):
        raise ValueError(f"scale: expected {theta.dtype} [{len(theta)}], got {scale.dtype} {list(scale.shape)}")
    _check_statistics(shape, theta, running, None)
    if chosen == "cpu":
        memory = _memory(workspace, shape, "tangent", theta, images, precision)
        slope, grad, images_grad, labels_grad = _OPS.convnet_step_tangent(
            theta.contiguous(),
            direction.contiguous(),
            images.contiguous(),
            labels.contiguous(),
            _sizes(shape),
            running,
            shape.eps,
            shape.slope,
            _KINDS.index(label_kind),
            precision == "bf16",
            curvature,
            theta.new_ones(len(theta)) if scale is None else scale.contiguous(),
            memory,
            tape,
        )
        return slope, grad if curvature else None, images_grad, None if label_kind == "hard" else labels_grad
    if chosen == "reference":
        found = reference.convnet_tangent(shape, theta, direction, images, labels, label_kind, running)
    else:
        run = workspace.graphs.tangent if workspace else layers.tangent
        found = run(shape, theta, direction, images, labels, label_kind=label_kind, precision=precision)
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
    precision: Precision = "fp32",
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
    chosen = _check(shape, theta, images, precision, backend, tape=tape)
    mask = _mask(shape, p, attended, axis)
    _check_statistics(shape, theta, running, None)
    if chosen == "reference":
        return reference.convnet_features(shape, theta, images, p, attended, axis, running)
    _refuse_cuda(chosen)
    memory = _memory(workspace, shape, "features", theta, images, precision)
    options = (running, shape.eps, shape.slope, precision == "bf16", p, mask)
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
    precision: Precision = "fp32",
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
    chosen = _check(shape, theta, images, precision, backend, tape=tape)
    _check_statistics(shape, theta, running, None)
    mask = _mask(shape, p, attended, "both")
    grads = (spatial_grad, channel_grad, embedding_grad)
    layers = [shape.layers[block] for block in attended]
    rows = (sum(at.height * at.width for at in layers), sum(at.out_channels for at in layers), shape.features)
    for name, grad, row in zip(("spatial_grad", "channel_grad", "embedding_grad"), grads, rows, strict=True):
        expected = (len(theta), images.shape[-4], row)
        if grad is not None and (grad.shape != expected or grad.dtype != theta.dtype):
            raise ValueError(f"{name}: expected {theta.dtype} {list(expected)}, got {grad.dtype} {list(grad.shape)}")
    if chosen == "reference":
        own = images.expand(len(theta), *images.shape[-4:]).detach().requires_grad_()
        with torch.enable_grad():
            outputs = reference.convnet_features(shape, theta.detach(), own, p, attended, "both", running)
            total = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True) if grad is not None)
            return torch.autograd.grad(total + 0 * own.sum(), own)[0]
    _refuse_cuda(chosen)
    memory = _memory(workspace, shape, "features_backward", theta, images, precision)
    return _OPS.convnet_step_features_backward(
        *(None if grad is None else grad.contiguous() for grad in grads),
        *(theta.contiguous(), images.contiguous(), _sizes(shape)),
        *(running, shape.eps, shape.slope, precision == "bf16", p, mask, memory, tape),
    )


def _mask(shape: ConvNetShape, p: float, attended: Sequence[int], axis: str) -> int:
    check_power(p)
    if axis not in AXES:
        raise ValueError(f"axis: expected 'spatial', 'channel' or 'both', got {axis!r}")
    if list(attended) != sorted({block for block in attended if 0 <= block < len(shape.layers)}):
        raise ValueError(f"attended: expected ascending blocks out of 0..{len(shape.layers) - 1}, got {list(attended)}")
    return sum(1 << block for block in attended)


def _refuse_cuda(chosen: str) -> None:
    if chosen == "cuda":
        raise NotImplementedError(
            "convnet_features has no kernel for CUDA tensors; pydistill.matching.features runs the network by autograd "
            "there, on pydistill.ops.attention_map"
        )


def workspace_bytes(
    shape: ConvNetShape, form: Form, students: int, images: int, dtype: torch.dtype, precision: Precision = "fp32"
) -> int:
    """The working memory of a step on the CPU, the threads' own included."""
    shared, _, own = _bytes(shape, form, students, images, dtype, precision)
    return shared + own * torch.get_num_threads()


def tape_bytes(
    shape: ConvNetShape, students: int, images: int, dtype: torch.dtype, precision: Precision = "fp32"
) -> int:
    """The size of the tape of one step on the CPU, rounded up so that another may follow it."""
    size = _bytes(shape, "gradient", students, images, dtype, precision)[1] * students * images
    return (size + 63) // 64 * 64


@lru_cache(maxsize=64)
def _bytes(
    shape: ConvNetShape, form: Form, students: int, images: int, dtype: torch.dtype, precision: Precision
) -> tuple[int, ...]:
    """Bytes for all threads together, for the tape of an image, for each thread."""
    double, half = dtype == torch.float64, precision == "bf16"
    return tuple(_OPS.convnet_step_bytes(_sizes(shape), _FORMS.index(form), students, images, double, half).tolist())


def _memory(
    workspace: Workspace | None, shape: ConvNetShape, form: Form, theta: Tensor, images: Tensor, precision: Precision
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


def _check_statistics(shape: ConvNetShape, theta: Tensor, running: Tensor | None, statistics: Tensor | None) -> None:
    channels = sum(shape.widths)
    if (running is not None) != (shape.norm == "running"):
        raise ValueError(f"running: expected statistics for the norm 'running' alone, which here is {shape.norm!r}")
    if statistics is not None and shape.norm != "batch":
        raise ValueError(f"statistics: expected them of the norm 'batch' alone, which here is {shape.norm!r}")
    each = (len(theta), 2, channels)
    wanted = (
        ("running", running, each[1:] if running is None or running.dim() == 2 else each),
        ("statistics", statistics, each),
    )
    for name, given, size in wanted:
        if given is not None and (given.shape != size or given.dtype != theta.dtype or given.device != theta.device):
            got = f"{given.dtype} {list(given.shape)} on {given.device}"
            raise ValueError(f"{name}: expected {theta.dtype} {list(size)} on {theta.device} as theta, got {got}")


def _check(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    precision: str,
    backend: str,
    labels: Tensor | None = None,
    label_kind: str = "hard",
    tape: Tensor | None = None,
) -> str:
    """The backend. In a loop the checks would take a tenth of a small step: signatures that passed are remembered."""
    given = [(t.shape, t.dtype, t.device, t.requires_grad) for t in (theta, images, labels) if t is not None]
    kinds = (shape, precision, backend, label_kind, tape is None, torch.is_grad_enabled())
    signature = (*given, *kinds)
    if signature not in _passed:
        if len(_passed) >= 64:
            _passed.clear()
        _passed[signature] = _check_all(shape, theta, images, precision, backend, labels, label_kind, tape)
    return _passed[signature]


def _check_all(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    precision: str,
    backend: str,
    labels: Tensor | None,
    label_kind: str,
    tape: Tensor | None,
) -> str:
    if theta.dim() != 2 or theta.shape[1] != shape.numel or not len(theta):
        raise ValueError(f"theta: expected [E, {shape.numel}] for this net, got {list(theta.shape)}")
    if precision not in ("fp32", "tf32", "bf16"):
        raise ValueError(f"precision: expected 'fp32', 'tf32' or 'bf16', got {precision!r}")
    if theta.dtype != torch.float32 and (theta.dtype != torch.float64 or precision != "fp32"):
        raise TypeError(f"theta: expected float32, or float64 with precision='fp32', got {theta.dtype}")
    tensors = {"images": images} if labels is None else {"images": images, "labels": labels}
    for name, tensor in tensors.items():
        if tensor.device != theta.device:
            raise ValueError(f"{name}: expected device {theta.device} as theta, got {tensor.device}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (theta, *tensors.values())):
        raise RuntimeError("convnet_step: not differentiable by autograd; pydistill.unroll is")
    E, sizes = len(theta), (shape.channels, shape.height, shape.width_px)
    if images.dtype != theta.dtype:
        raise TypeError(f"images: expected dtype {theta.dtype} as theta, got {images.dtype}")
    if images.shape[-3:] != sizes or images.shape[:-4] not in ((), (E,)) or not images.shape[-4]:
        raise ValueError(f"images: expected [N, *{sizes}] or [{E}, N, *{sizes}], got {list(images.shape)}")
    last = shape.layers[-1]
    if shape.norm == "batch" and images.shape[-4] * last.height * last.width == 1:
        raise ValueError("images: expected more than one value a channel for a batch norm, got one image of one pixel")
    if labels is not None:
        if label_kind not in _KINDS:
            raise ValueError(f"label_kind: expected 'hard', 'logits' or 'probs', got {label_kind!r}")
        expected = (images.shape[-4],) if label_kind == "hard" else (images.shape[-4], shape.classes)
        dtype = torch.int64 if label_kind == "hard" else theta.dtype
        if labels.dtype != dtype:
            raise TypeError(f"labels: expected {dtype} for label_kind={label_kind!r}, got {labels.dtype}")
        if labels.shape not in (expected, (E, *expected)):
            shapes = f"{list(expected)} or {[E, *expected]}"
            raise ValueError(f"labels: expected shape {shapes}, got {list(labels.shape)}")
    chosen = choose_backend("convnet_step", backend, theta.device, BACKENDS)
    if chosen != "reference" and (missing := _library.unavailable_step(theta.device, theta.dtype, precision)):
        raise NotImplementedError(f"convnet_step: {missing}")
    if chosen == "reference" and precision != "fp32":
        raise NotImplementedError(f"convnet_step: backend='reference' has precision='fp32' only, got {precision!r}")
    if chosen == "cuda" and not (shape.fused and shape.biased):
        raise NotImplementedError(
            "convnet_step: backend='cuda' has blocks of biases, instance norm, ReLU and average pool only"
        )
    if chosen == "cpu" and precision == "tf32":
        raise NotImplementedError("convnet_step: backend='cpu' has no precision='tf32'")
    if chosen != "cpu" and tape is not None:
        raise NotImplementedError(f"convnet_step: backend={chosen!r} keeps no tape")
    return chosen
