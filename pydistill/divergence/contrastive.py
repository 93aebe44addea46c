r"""Cross entropy of similarities, with one positive per row or many: InfoNCE, CLIP, SupCon.

For row i, with s_ij = scale <q_i, k_j>, the keys j that it sees and P(i) its positives among them,

    loss_i            = log sum_j exp(s_ij) - 1 / |P(i)| sum_{p in P(i)} s_ip
    d loss_i / d s_ij = softmax_j(s_i) - [j in P(i)] / |P(i)|

The matrix s is made some rows at a time, and again in the backward pass; the forward pass keeps one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill.ops._operator import check_plain_backend

__all__ = ["contrastive_ce"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ELEMENTS_AT_ONCE = 1 << 20  # of s; a few more blocks of this size are needed


def contrastive_ce(
    q: Tensor,
    k: Tensor | None,
    *,
    scale: float | Tensor,
    labels: Tensor | None = None,
    labels_k: Tensor | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    normalise: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrastive cross entropy of queries among keys, without keeping all pairwise similarities.

    Without labels, query i's positive is key i: equivalent to ``F.cross_entropy(scale * q @ k.T, torch.arange(B))`` of
    normalised rows, InfoNCE (van den Oord et al., 2018); with ``symmetric``, averaged with the same of ``k @ q.T``, as
    in CLIP (Radford et al., ICML 2021). With labels, its positives are all keys of its class, the loss being minus
    the mean of their log softmax: SupCon (Khosla et al., NeurIPS 2020), for two views as rows of one q ::

        contrastive_ce(torch.cat([view1, view2]), None, scale=1 / 0.07, labels=y.repeat(2), exclude_self=True)

    which FedLGD (Huang et al., TMLR 2024) uses between local and global synthetic images. Differentiable once in q, k
    and scale; a second derivative raises ``NotImplementedError``. Equal bits across runs, but not across thread
    counts, by which torch's matrix product splits its sums.

    Args:
        q: ``[B, d]`` queries; float32, float64, bfloat16 or float16, computed in float32 (float64 for float64).
        k: ``[M, d]`` keys, dtype and device of q; None: the queries are the keys, which requires labels.
        scale: factor on the similarities, 1 / temperature; a number, or a scalar tensor that may be learnt.
        labels: int64 ``[B]`` class numbers.
        labels_k: int64 ``[M]`` those of the keys; by default those of the queries.
        symmetric: the mean of both directions; requires k.
        exclude_self: query i does not see key i; requires as many keys as queries.
        normalise: divide rows by their length first.
        reduction: "mean" over the queries that have a positive (NaN where none has), "sum", or "none": a query that has
            none counts zero.
        backend: "auto" or "reference": it is plain torch on every device.

    Returns:
        A scalar, or ``[B]`` for reduction "none"; in float32 or float64.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit.
        NotImplementedError: in the backward pass of a gradient.
    """
    _check(q, k, scale, labels, labels_k, symmetric, exclude_self, reduction)
    check_plain_backend("contrastive_ce", backend)
    if labels is None:
        labels = torch.arange(len(q), device=q.device)
    q, *given = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in ((q,) if k is None else (q, k)))
    q, *given = (F.normalize(t, dim=1) for t in (q, *given)) if normalise else (q, *given)
    k = given[0] if given else None
    scale = scale.to(q) if isinstance(scale, Tensor) else q.new_full((), scale)
    with torch.autocast(q.device.type, enabled=False):
        found = [_ContrastiveCE.apply(q, k, scale, labels, labels_k, exclude_self)[:2]]
        if symmetric:
            swapped = (labels, None) if labels_k is None else (labels_k, labels)
            found.append(_ContrastiveCE.apply(k, q, scale, *swapped, exclude_self)[:2])
    if reduction == "none":
        return torch.stack([loss for loss, _ in found]).mean(0)
    sums = [loss.sum() / (counts > 0).sum() if reduction == "mean" else loss.sum() for loss, counts in found]
    return torch.stack(sums).mean()


def _blocks(
    q: Tensor, k: Tensor | None, labels: Tensor, labels_k: Tensor | None, exclude_self: bool
) -> Iterator[tuple]:
    """Slices of the rows of q, with the unscaled similarities, the unseen keys and the positives, each ``[R, M]``."""
    k, labels_k = q if k is None else k, labels if labels_k is None else labels_k
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, len(k)))
    column = torch.arange(len(k), device=q.device)
    for start in range(0, len(q), rows):
        at = slice(start, min(start + rows, len(q)))
        hidden = column == torch.arange(at.start, at.stop, device=q.device)[:, None] if exclude_self else None
        positive = labels[at, None] == labels_k
        if hidden is not None:
            positive = positive & ~hidden
        yield at, q[at] @ k.T, hidden, positive


class _ContrastiveCE(torch.autograd.Function):
    """The rows' losses ``[B]``, their numbers of positives and their log sums of exponentials.

    None for k or labels_k means q or labels: dynamo does not accept the same tensor twice.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor | None, scale: Tensor, labels: Tensor, labels_k: Tensor | None, exclude_self: bool
    ) -> tuple:
        losses, counts, sums = [q.new_zeros(0)], [labels.new_zeros(0)], [q.new_zeros(0)]
        for _, s, hidden, positive in _blocks(q, k, labels, labels_k, exclude_self):
            s = s * scale
            count = positive.sum(1)
            attracted = s.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
            lse = (s if hidden is None else s.masked_fill(hidden, -torch.inf)).logsumexp(1)
            losses.append(torch.where(count > 0, lse - attracted, 0))
            counts.append(count)
            sums.append(lse)
        return torch.cat(losses), torch.cat(counts), torch.cat(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.exclude_self = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        d_q, d_k, d_scale = _Gradient.apply(grad, *ctx.saved_tensors, ctx.exclude_self)
        if ctx.saved_tensors[1] is None:
            d_q, d_k = d_q + d_k, None
        return d_q, d_k, d_scale, None, None, None


class _Gradient(torch.autograd.Function):
    """With respect to q, k and scale."""

    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        labels_k: Tensor | None,
        counts: Tensor,
        sums: Tensor,
        exclude_self: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = q if k is None else k
        d_q, d_k, d_scale = [q.new_zeros(0, q.shape[1])], torch.zeros_like(keys), torch.zeros_like(scale)
        grad = torch.where(counts > 0, grad, 0)
        for at, s, hidden, positive in _blocks(q, k, labels, labels_k, exclude_self):
            slope = (s * scale - sums[at, None]).exp()
            if hidden is not None:
                slope = slope.masked_fill(hidden, 0)
            slope = (slope - positive.to(s.dtype) / counts[at, None].clamp_min(1)) * grad[at, None]
            d_scale = d_scale + (slope * s).sum()
            slope = slope * scale
            d_q.append(slope @ keys)
            d_k = d_k.addmm(slope.T, q[at])
        return torch.cat(d_q), d_k, d_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise NotImplementedError("contrastive_ce is differentiable once, not more")


def _check(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    labels: Tensor | None,
    labels_k: Tensor | None,
    symmetric: bool,
    exclude_self: bool,
    reduction: str,
) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    for name, tensor in (("q", q), ("k", k)):
        if name == "k" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dim() != 2 or not len(tensor):
            raise ValueError(f"{name}: expected [rows, d] with at least one row, got {list(tensor.shape)}")
    if k is not None and (k.shape[1] != q.shape[1] or k.dtype != q.dtype or k.device != q.device):
        wanted = f"{q.dtype} [M, {q.shape[1]}] on {q.device} as q"
        raise ValueError(f"k: expected {wanted}, got {k.dtype} {list(k.shape)} on {k.device}")
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f"scale: expected a number or a scalar tensor, got {list(scale.shape)}")
    M = len(q) if k is None else len(k)
    for name, tensor, rows in (("labels", labels, len(q)), ("labels_k", labels_k, M)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected int64 class numbers, got {got}")
        if tensor.shape != (rows,) or tensor.device != q.device:
            wanted = f"[{rows}] on {q.device}"
            raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)} on {tensor.device}")
    if labels is None and labels_k is not None:
        raise ValueError("labels: expected those of the queries with labels_k, got None")
    if k is None:
        if labels is None:
            raise ValueError("labels: expected class numbers where q is its own k, got None")
        if labels_k is not None:
            raise ValueError("labels_k: expected None where q is its own k, got a tensor")
        if symmetric:
            raise ValueError("symmetric: expected False where q is its own k, got True")
    if len(q) != M:
        wanted = f"as many rows as q, {len(q)}"
        if labels is None or exclude_self or (symmetric and reduction == "none"):
            raise ValueError(f"k: expected {wanted}, to pair them, got {M}")
        if labels_k is None:
            raise ValueError(f"labels_k: expected class numbers for {M} keys of {len(q)} queries, got None")
    elif labels is None and exclude_self:
        raise ValueError("exclude_self: expected False without labels, when key i is query i's positive, got True")
