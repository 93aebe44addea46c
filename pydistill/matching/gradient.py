"""The distance of two gradients of a network, as the gradient-matching methods measure it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pydistill.ops.row_products import row_products

__all__ = ["gradient_match"]

_PIECE = 4096  # elements that are summed at a time where there are no rows


def gradient_match(
    grads_syn: Sequence[Tensor] | Tensor,
    grads_real: Sequence[Tensor] | Tensor,
    *,
    kind: Literal["row_cos", "cos", "mse"] = "row_cos",
    shapes: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    reduction: Literal["sum", "mean", "none"] = "sum",
) -> Tensor:
    """How far the gradient on synthetic images is from that on real ones.

    The ``match_loss`` of DC ("Dataset Condensation with Gradient Matching", Zhao, Mopuri, Bilen, ICLR 2021), DSA, IDC
    and FedLGD. "row_cos", which their code calls "ours", is equivalent to ::

        sum((1 - (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + eps)).sum()
            for r, s in zip(grads_real, grads_syn) if r.dim() > 1)        # r, s flattened to [out, in * k * k]

    so that parameters of one dimension have no part in it; "cos" is one such distance of all parameters joined, "mse"
    ``sum((r - s).square().sum() for r, s in zip(grads_real, grads_syn))``. A row that is zero is at distance 1 from any
    other, and has no gradient. Differentiable in both sides, to any order. Sums are in float32 (float64 for float64).

    Args:
        grads_syn: a tensor for each parameter, as ``torch.autograd.grad`` gives them; or, with ``shapes``, all of them
            in one vector ``[P]``, or K of those ``[K, P]``, as `pydistill.matching.class_gradients` does.
        grads_real: as grads_syn, in its dtype.
        kind: the distance.
        shapes: the parameters' shapes, in order, where the gradients are flat: ``[p.shape for p in net.parameters()]``.
        eps: what is added to the product of the norms.
        reduction: over the K distances: "sum" as the methods have it, "mean", or "none".

    Returns:
        A scalar; ``[K]`` for gradients ``[K, P]`` and reduction "none"; float32 (float64 for float64).

    Raises:
        TypeError: a side is neither a tensor nor a sequence of tensors, or of another dtype than the other.
        ValueError: the sides differ in length or shape (the message names the entry), shapes do not fit, or an option
            is not known.
    """
    if kind not in ("row_cos", "cos", "mse"):
        raise ValueError(f"kind: expected 'row_cos', 'cos' or 'mse', got {kind!r}")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction: expected 'sum', 'mean' or 'none', got {reduction!r}")
    if isinstance(grads_syn, Tensor) != isinstance(grads_real, Tensor):
        raise TypeError("grads_real: expected a flat tensor where grads_syn is one, and a sequence where it is not")
    if isinstance(grads_syn, Tensor):
        syn, real, shapes, one = *_flat(grads_syn, grads_real, shapes), grads_syn.dim() == 1
    else:
        if shapes is not None:
            raise ValueError("shapes: expected None for sequences of gradients, which have their own")
        (syn, real), shapes, one = _joined(grads_syn, grads_real), [g.shape for g in grads_syn], True
    products = row_products(real, syn, _rows(kind, shapes))  # [K, R, 4]
    if kind == "mse":
        losses = products[..., 3].sum(1)
    else:
        if kind == "cos":
            products = products.sum(1, keepdim=True)
        norms = _root(products[..., 1]) * _root(products[..., 2])
        losses = (1 - products[..., 0] / (norms + eps)).sum(1)
    if one:
        return losses[0]
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _root(squared: Tensor) -> Tensor:
    """The square root, and no gradient where it is zero, as torch's norm has none."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), squared)


def _rows(kind: str, shapes: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Where the rows lie in the flat vector: those of matrices for "row_cos", else pieces of all of it."""
    sizes = [math.prod(shape) for shape in shapes]
    if kind != "row_cos":
        P = sum(sizes)
        whole = P // _PIECE
        return [(0, whole, _PIECE), (whole * _PIECE, 1, P - whole * _PIECE)]
    found, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        if len(shape) > 1 and size:
            found.append((start, shape[0], size // shape[0]))
        start += size
    return found


def _flat(syn: Tensor, real: Tensor, shapes: Sequence[Sequence[int]] | None) -> tuple:
    """Both as [K, P], and the shapes."""
    if shapes is None:
        raise ValueError("shapes: expected the parameters' shapes for flat gradients, got None")
    P = sum(math.prod(shape) for shape in shapes)
    if syn.dim() not in (1, 2) or syn.shape[-1] != P:
        raise ValueError(f"grads_syn: expected [{P}] or [K, {P}] for these shapes, got {list(syn.shape)}")
    if real.shape != syn.shape:
        raise ValueError(f"grads_real: expected shape {list(syn.shape)} as grads_syn, got {list(real.shape)}")
    _check_alike("grads_real", real, syn)
    return *(t.reshape(-1, P) for t in (syn, real)), shapes


def _joined(syn: Sequence[Tensor], real: Sequence[Tensor]) -> list[Tensor]:
    """Both as [1, P]."""
    for name, side in (("grads_syn", syn), ("grads_real", real)):
        for i, g in enumerate(side):
            if not isinstance(g, Tensor):
                raise TypeError(f"{name}[{i}]: expected a tensor, got {type(g).__name__}")
    if len(syn) != len(real) or not len(syn):
        raise ValueError(
            f"grads_real: expected as many gradients as grads_syn, and at least one, got {len(real)} and {len(syn)}"
        )
    for i, (s, r) in enumerate(zip(syn, real, strict=True)):
        if s.shape != r.shape:
            raise ValueError(f"grads_real[{i}]: expected shape {list(s.shape)} as grads_syn[{i}], got {list(r.shape)}")
        _check_alike(f"grads_real[{i}]", r, s)
    return [torch.cat([g.reshape(-1) for g in side])[None] for side in (syn, real)]


def _check_alike(name: str, real: Tensor, syn: Tensor) -> None:
    if real.dtype != syn.dtype or real.device != syn.device:
        wanted, got = (f"{t.dtype} on {t.device}" for t in (syn, real))
        raise TypeError(f"{name}: expected {wanted} as grads_syn, got {got}")
