"""The distance of two gradients of a network, as the gradient-matching methods measure it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill.ops.row_products import row_products

__all__ = ["gradient_match"]

_PIECE = 4096  # elements that are summed at a time where there are no rows


def gradient_match(
    *,
    grads_real: Sequence[Tensor] | Tensor,
    grads_syn: Sequence[Tensor] | Tensor,
    kind: Literal["row_cos", "cos", "mse"] = "row_cos",
    shapes: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    reduction: Literal["sum", "mean", "none"] = "sum",
    backend: str = "auto",
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
        grads_real: a tensor for each parameter, as ``torch.autograd.grad`` gives them; or, with ``shapes``, all of them
            in one vector ``[P]``, or K of those ``[K, P]``, as `pydistill.matching.class_gradients` does. This side and
            the next are given by name only: the published codes disagree about which comes first.
        grads_syn: as grads_real, in its dtype.
        kind: the distance.
        shapes: the parameters' shapes, in order, where the gradients are flat: ``[p.shape for p in net.parameters()]``.
        eps: what is added to the product of the norms.
        reduction: over the K distances: "sum" as the methods have it, "mean", or "none".
        backend: as of `pydistill.ops.row_products`.

    Returns:
        A scalar; ``[K]`` for gradients ``[K, P]`` and reduction "none"; float32 (float64 for float64).

    Raises:
        TypeError: a side is neither a tensor nor a sequence of tensors, or of another dtype than the other.
        ValueError: the sides differ in length or shape (the message names the entry), shapes do not fit, or an option
            is not known.
    """
    check_choice("kind", kind, ("row_cos", "cos", "mse"))
    check_choice("reduction", reduction, ("sum", "mean", "none"))
    if isinstance(grads_real, Tensor) and isinstance(grads_syn, Tensor):
        real, syn, shapes, one = *_flat(grads_real, grads_syn, shapes), grads_real.dim() == 1
    elif isinstance(grads_real, Tensor) or isinstance(grads_syn, Tensor):
        raise TypeError("grads_syn: expected a flat tensor where grads_real is one, and a sequence where it is not")
    else:
        if shapes is not None:
            raise ValueError("shapes: expected None for sequences of gradients, which have their own")
        (real, syn), shapes, one = _joined(grads_real, grads_syn), [g.shape for g in grads_real], True
    products = row_products(real, syn, _rows(kind, shapes), backend=backend)  # [K, R, 4]
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


def _flat(real: Tensor, syn: Tensor, shapes: Sequence[Sequence[int]] | None) -> tuple:
    """Both as [K, P], and the shapes."""
    if shapes is None:
        raise ValueError("shapes: expected the parameters' shapes for flat gradients, got None")
    P = sum(math.prod(shape) for shape in shapes)
    if real.dim() not in (1, 2) or real.shape[-1] != P:
        raise ValueError(f"grads_real: expected [{P}] or [K, {P}] for these shapes, got {list(real.shape)}")
    if syn.shape != real.shape:
        raise ValueError(f"grads_syn: expected shape {list(real.shape)} as grads_real, got {list(syn.shape)}")
    _check_alike("grads_syn", syn, "grads_real", real)
    return *(t.reshape(-1, P) for t in (real, syn)), shapes


def _joined(real: Sequence[Tensor], syn: Sequence[Tensor]) -> list[Tensor]:
    """Both as [1, P]."""
    for name, side in (("grads_real", real), ("grads_syn", syn)):
        for i, g in enumerate(side):
            if not isinstance(g, Tensor):
                raise TypeError(f"{name}[{i}]: expected a tensor, got {type(g).__name__}")
    if len(syn) != len(real) or not len(real):
        raise ValueError(
            f"grads_syn: expected as many gradients as grads_real, and at least one, got {len(syn)} and {len(real)}"
        )
    for i, (r, s) in enumerate(zip(real, syn, strict=True)):
        if s.shape != r.shape:
            raise ValueError(f"grads_syn[{i}]: expected shape {list(r.shape)} as grads_real[{i}], got {list(s.shape)}")
        _check_alike(f"grads_syn[{i}]", s, f"grads_real[{i}]", r)
    return [torch.cat([g.reshape(-1) for g in side])[None] for side in (real, syn)]


def _check_alike(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.dtype != other.dtype or t.device != other.device:
        wanted, got = (f"{each.dtype} on {each.device}" for each in (other, t))
        raise TypeError(f"{name}: expected {wanted} as {other_name}, got {got}")
