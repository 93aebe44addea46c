"""What the arguments of the student engine's steps have to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydistill import _library
from pydistill._arguments import check_choice
from pydistill.ops._operator import choose_backend
from pydistill.ops._precision import Precision, Resolved, resolved
from pydistill.ops.attention_map import AXES, check_power
from pydistill.reference.convnet_shape import ConvNetShape

BACKENDS = ("reference", "cpu", "cuda")
KINDS = ("hard", "logits", "probs")  # in the order of ConvNetStep::Labels
_passed: dict[tuple, str] = {}  # backends by the arguments' signatures


def check_statistics(shape: ConvNetShape, theta: Tensor, running: Tensor | None, statistics: Tensor | None) -> None:
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


def check_step(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    precision: Precision,
    backend: str,
    labels: Tensor | None = None,
    label_kind: str = "hard",
    tape: Tensor | list[Tensor] | None = None,
) -> tuple[str, Resolved]:
    """The backend and the precision. In a loop the checks would take a tenth of a small step: signatures that passed
    are remembered."""
    to = resolved(precision, theta.device, theta.dtype)
    given = [(t.shape, t.dtype, t.device, t.requires_grad) for t in (theta, images, labels) if t is not None]
    kinds = (shape, to, backend, label_kind, type(tape), torch.is_grad_enabled())
    signature = (*given, *kinds)
    if signature not in _passed:
        if len(_passed) >= 64:
            _passed.clear()
        _passed[signature] = _check_all(shape, theta, images, to, backend, labels, label_kind, tape)
    return _passed[signature], to


def _check_all(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    precision: Resolved,
    backend: str,
    labels: Tensor | None,
    label_kind: str,
    tape: Tensor | list[Tensor] | None,
) -> str:
    if theta.dim() != 2 or theta.shape[1] != shape.numel or not len(theta):
        raise ValueError(f"theta: expected [E, {shape.numel}] for this net, got {list(theta.shape)}")
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"theta: expected float32 or float64, got {theta.dtype}")
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
        check_choice("label_kind", label_kind, KINDS)
        expected = (images.shape[-4],) if label_kind == "hard" else (images.shape[-4], shape.classes)
        dtype = torch.int64 if label_kind == "hard" else theta.dtype
        if labels.dtype != dtype:
            raise TypeError(f"labels: expected {dtype} for label_kind={label_kind!r}, got {labels.dtype}")
        if labels.shape not in (expected, (E, *expected)):
            shapes = f"{list(expected)} or {[E, *expected]}"
            raise ValueError(f"labels: expected shape {shapes}, got {list(labels.shape)}")
    chosen = choose_backend("convnet_step", backend, theta.device, BACKENDS)
    if chosen != "reference" and (missing := _library.unavailable_steps(theta.device)):
        raise NotImplementedError(f"convnet_step: {missing}")
    if chosen == "reference" and precision == "bf16":
        raise NotImplementedError("convnet_step: backend='reference' has no precision='bf16'")
    if chosen == "cuda" and not (shape.fused and shape.biased):
        raise NotImplementedError(
            "convnet_step: backend='cuda' has blocks of biases, instance norm, ReLU and average pool only"
        )
    if chosen == "reference" and tape is not None:
        raise NotImplementedError("convnet_step: backend='reference' keeps no tape")
    if tape is not None and isinstance(tape, list) != (chosen == "cuda"):
        wanted = "a list" if chosen == "cuda" else "a uint8 tensor"
        raise TypeError(f"tape: expected {wanted} for backend={chosen!r}, got a {type(tape).__name__}")
    return chosen


def mask_of(shape: ConvNetShape, p: float, attended: Sequence[int], axis: str) -> int:
    check_power(p)
    check_choice("axis", axis, AXES)
    if list(attended) != sorted({block for block in attended if 0 <= block < len(shape.layers)}):
        raise ValueError(f"attended: expected ascending blocks out of 0..{len(shape.layers) - 1}, got {list(attended)}")
    return sum(1 << block for block in attended)


def refuse_cuda(chosen: str) -> None:
    if chosen == "cuda":
        raise NotImplementedError(
            "convnet_features has no kernel for CUDA tensors; pydistill.matching.features runs the network by autograd "
            "there, on pydistill.ops.attention_map"
        )
