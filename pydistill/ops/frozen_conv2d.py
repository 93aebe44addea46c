"""Convolutions whose filters stay as they are: the layers of a frozen evaluation network, and the way back to its
images. Winograd's F(4x4, 3x3), and its relatives on cells of 2x2 pixels where the stride is 2, with filters that are
transformed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend

BACKENDS = ("reference", "cpu")

_POINTS = (5 / 8, 3 / 2)  # of interpolation, beside 0 and infinity: those of csrc/kernels/winograd.h
_VECTOR = 64  # bytes


class FrozenFilters(NamedTuple):
    """Filters of `frozen_conv2d`, transformed for both directions; made by `frozen_filters`.

    ``weight`` as it was; ``forward`` ``[36, ceil(K / L), C, L]`` and ``adjoint`` ``[36, ceil(C / L), K, L]`` with
    vectors of 64 bytes of output channels: L is 16 in float32, 8 in float64. For bfloat16 they are int16,
    ``[36, ceil(K / 16), 1 + C / 2, 32]`` and so on with an even C and K: rows of pairs of input channels, and before
    them the 16 float32 factors, by their bits, that undo each output channel's scaling. Together they take eight times
    the memory of the weight in their dtype. For a ``stride`` of 2, C is four times that of the weight: then they take
    32 times its memory for 3x3 taps, six times for 7x7.
    """

    weight: Tensor
    forward: Tensor
    adjoint: Tensor
    stride: int


def frozen_filters(weight: Tensor, dtype: torch.dtype | None = None, *, stride: int | None = None) -> FrozenFilters:
    """Transform the filters of a convolution for `frozen_conv2d` and for its gradient.

    Args:
        weight: ``[K, C, 3, 3]`` or ``[K, C, 7, 7]``, float32, float64, bfloat16 or float16, without a gradient.
        dtype: of the images that they are for, by default that of the weight. float32 and float16 share float32
            filters; bfloat16 has 16-bit integers.
        stride: of the convolution: 1 or 2 for 3x3 taps, 1 by default; 2 for 7x7.

    Raises:
        TypeError: no tensor, or an unsupported dtype.
        ValueError: another shape or stride, or a weight that requires a gradient.
    """
    _check_weight(weight)
    stride = _stride(weight, stride)
    form = _form(weight.dtype if dtype is None else dtype, "dtype")
    taps = weight if stride == 1 else _by_cells(weight)
    if form == torch.int16:
        taps = F.pad(taps, (0, 0, 0, 0, 0, taps.shape[1] % 2, 0, taps.shape[0] % 2))
    turned = taps.flip(2, 3).transpose(0, 1)  # the adjoint is the convolution with these
    return FrozenFilters(weight, _transformed(taps, form), _transformed(turned, form), stride)


def _form(dtype: torch.dtype, name: str) -> torch.dtype:
    """What the filters for images of ``dtype`` are kept in."""
    forms = {torch.float64: torch.float64, torch.bfloat16: torch.int16}
    forms |= dict.fromkeys((torch.float32, torch.float16), torch.float32)
    if dtype not in forms:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype}")
    return forms[dtype]


def frozen_conv2d(
    x: Tensor, filters: FrozenFilters | Tensor, *, stride: int | None = None, backend: str = "auto"
) -> Tensor:
    """Equivalent to ``F.conv2d(x, weight, stride=stride, padding=1)`` for a constant ``weight`` ``[K, C, 3, 3]`` and,
    for the stem of a ResNet, to ``F.conv2d(x, weight, stride=2, padding=3)`` for one ``[K, C, 7, 7]``.

    Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) with
    filters that were transformed before: a quarter of the products, in the forward pass and in the gradient with
    respect to x, which is the same operator with turned filters. With stride 2, 7x7 taps are 4x4 and 3x3 taps are 2x2
    on cells of 2x2 pixels, for which the same 36 points serve: F(3x3, 4x4) and F(5x5, 2x2). Linear in x and
    differentiable to any order; the filters are constants and have no gradient.

    Args:
        x: ``[N, C, H, W]``, C, H, W >= 1; float32, float64, bfloat16 or float16, any strides; channels-last is read
            as it is, other layouts, and float16, are copied first. Arithmetic is in float32 (float64 for float64); for
            bfloat16 the products, between float32 transforms, are exact ones of 16-bit integers, twice as many in the
            same time.
        filters: of `frozen_filters`, for the dtype of x; or the weight itself, which is then transformed in every
            call.
        stride: 1 or 2 for 3x3 taps, 2 for 7x7; by default that of the filters, for a weight 1 or, for 7x7 taps, 2.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device) or "cpu".

    Returns:
        ``[N, K, H, W]``, ``[N, K, ceil(H / 2), ceil(W / 2)]`` for stride 2, in the dtype of x and, whatever the layout
        of x, in channels-last memory ("reference": as torch's convolution gives it). Equal bits over thread counts;
        instruction sets differ in the last bits, for products are fused where the processor can. The float32 error is
        within four times that of a direct convolution in L2 and, for 3x3 taps, in the largest element (about five times
        there for 7x7). With 3x3 taps and stride 2 the gradient's, whose direct sums are a quarter as long, is three to
        seven times (up to nine in the largest element). In bfloat16, where the weight is not rounded, the error is
        below that of a direct convolution of bfloat16 weights. What is not finite in x makes NaN of every tile that
        sees it: 4x4 outputs, with stride 2 5x5, or 3x3 for 7x7 taps.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: shapes, strides, dtypes or devices do not fit, or the weight requires a gradient.
        NotImplementedError: the backend cannot run here.
    """
    weight = filters.weight if isinstance(filters, FrozenFilters) else filters
    _check_weight(weight)
    if isinstance(filters, FrozenFilters):
        if stride not in (None, filters.stride):
            raise ValueError(f"stride: expected {filters.stride} as the filters, got {stride}")
        stride = filters.stride
    else:
        stride = _stride(weight, stride)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    form = _form(x.dtype, "x")
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape[2:]:
        raise ValueError(f"x: expected [N, {weight.shape[1]}, H, W] with H, W >= 1, got shape {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x: expected device {weight.device} as the filters, got {x.device}")
    chosen = choose_backend("frozen_conv2d", backend, x.device, BACKENDS)
    if chosen == "reference":
        return reference.frozen_conv2d(x, weight, stride)
    if x.dtype == torch.float16:
        return frozen_conv2d(x.float(), filters, stride=stride, backend=backend).half()
    if not isinstance(filters, FrozenFilters):
        filters = frozen_filters(weight, x.dtype, stride=stride)
    elif filters.forward.dtype != form:
        raise ValueError(f"filters: expected {form} for x in {x.dtype}, got {filters.forward.dtype}")
    taps, before = (3, 1) if stride == 1 else _cells(weight)
    if stride == 2:
        if x.shape[2] % 2 or x.shape[3] % 2:  # the outputs are as many either way
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    elif form == torch.int16 and x.shape[1] % 2:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
    y = _forward(x, filters.forward, filters.adjoint, taps, before)
    return y if y.shape[1] == weight.shape[0] else y[:, :-1].contiguous(memory_format=torch.channels_last)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    _form(weight.dtype, "weight")
    if weight.dim() != 4 or weight.shape[2:] not in ((3, 3), (7, 7)) or 0 in weight.shape:
        raise ValueError(
            f"weight: expected [K, C, 3, 3] or [K, C, 7, 7] with K, C >= 1, got shape {list(weight.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight: expected frozen filters, got a tensor that requires a gradient; there is none, "
            "so freeze it (requires_grad_(False)) or use torch's convolution"
        )


def _stride(weight: Tensor, stride: int | None) -> int:
    allowed = (1, 2) if weight.shape[2] == 3 else (2,)
    if stride is None:
        return allowed[0]
    if stride not in allowed:
        raise ValueError(f"stride: expected {' or '.join(map(str, allowed))} for these taps, got {stride!r}")
    return stride


def _cells(weight: Tensor) -> tuple[int, int]:
    """With stride 2, how many cells of 2x2 pixels a side the taps span, and how many of them are before the position's:
    (4, 2) for 7x7 taps, (2, 1) for 3x3."""
    taps = (weight.shape[2] + 1) // 2
    return taps, taps // 2


def _by_cells(weight: Tensor) -> Tensor:
    """A filter of stride 2 as ``[K, 4 C, taps, taps]`` on cells; a cell's channels are its pixels' in their order."""
    K, C = weight.shape[:2]
    taps, _ = _cells(weight)
    even = F.pad(weight, (1, 0, 1, 0))  # begins with a cell
    return even.view(K, C, taps, 2, taps, 2).permute(0, 3, 5, 1, 2, 4).reshape(K, 4 * C, taps, taps)


def filter_points(dtype: torch.dtype, device: torch.device | str = "cpu", taps: int = 3) -> Tensor:
    """``[36, taps * taps]``: what makes a filter's value at each point of its taps."""
    a, b = _POINTS
    of_a, of_b = 1 / (2 * a**2 * (a**2 - b**2)), 1 / (2 * b**2 * (b**2 - a**2))
    finite = ((0.0, 1 / (a * b) ** 2), (a, of_a), (-a, of_a), (b, of_b), (-b, of_b))
    rows = [[point**i * scale for i in range(taps)] for point, scale in finite]
    rows.append([0.0] * (taps - 1) + [1.0])  # infinity
    g = torch.tensor(rows, dtype=torch.float64, device=device)  # [6, taps]
    return torch.kron(g, g).to(dtype)


def _transformed(weight: Tensor, form: torch.dtype) -> Tensor:
    """G w G^T in float64, as FrozenFilters has it."""
    K, C, taps, _ = weight.shape
    both = filter_points(torch.float64, weight.device, taps)
    lanes = 16 if form == torch.int16 else _VECTOR // form.itemsize
    vectors = -(-K // lanes)
    out = torch.zeros((36, vectors * lanes, C), dtype=form, device=weight.device)
    factors = torch.ones((36, vectors * lanes), dtype=torch.float32, device=weight.device)
    of_taps = weight.reshape(K * C, taps * taps).double().t()
    for point in range(36):  # one at a time: all of them in float64 would take 8 times the weight again
        filters = (both[point] @ of_taps).view(K, C)
        if form == torch.int16:
            scale = _scale(filters)
            factors[point, :K] = 1 / scale  # NaN where a filter is not finite
            filters = (filters * scale[:, None]).round().nan_to_num(0.0)
        out[point, :K] = filters
    if form != torch.int16:
        return out.view(36, vectors, lanes, C).transpose(2, 3).contiguous()
    pairs = out.view(36, vectors, lanes, C // 2, 2).transpose(2, 3).flatten(3)
    return torch.cat([factors.view(36, vectors, 1, lanes).view(torch.int16), pairs], 2)


def _scale(filters: Tensor) -> Tensor:
    """For each row what makes 16-bit integers of it, with the norm that csrc/kernels/int16_pairs.h allows."""
    norm, largest = filters.norm(dim=1), filters.abs().amax(1)
    rounding = 0.5 * filters.shape[1] ** 0.5
    scale = torch.minimum((65535 - rounding) / norm, 32767 / largest)
    return torch.where(norm == 0, 1.0, torch.where(norm.isfinite(), scale, torch.nan))


def _fake(x: Tensor, forward: Tensor, adjoint: Tensor, taps: int, before: int) -> Tensor:
    K = 2 * (adjoint.shape[2] - 1) if adjoint.dtype == torch.int16 else adjoint.shape[2]
    N, _, H, W = x.shape
    shape = (N, K, H, W)
    if taps % 2 == 0:  # of cells, or to them
        shape = (N, K, H // 2, W // 2) if before == taps // 2 else (N, K // 4, 2 * H, 2 * W)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _vmap(info: Any, in_dims: tuple, x: Tensor, forward: Tensor, adjoint: Tensor, *options: int) -> tuple[Tensor, int]:
    """Images are independent, so a batch dimension becomes more images."""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise NotImplementedError("frozen_conv2d: vmap over filters is not supported; they are one network's constants")
    x = x.movedim(in_dims[0], 0)
    out = _forward.raw(x.flatten(0, 1), forward, adjoint, *options)
    return out.unflatten(0, x.shape[:2]), 0


def _vjp(saved: tuple, options: tuple, grad: Tensor) -> tuple:
    taps, before = options
    return _forward(grad, saved[2], saved[1], taps, taps - 1 - before), None, None


_forward: Operator = Operator(
    "frozen_conv2d",
    tensors=3,
    fake=_fake,
    vjp=_vjp,
    jvp=lambda saved, options, x_t, *rest: _forward(x_t, saved[1], saved[2], *options),
    vmap=_vmap,
)
