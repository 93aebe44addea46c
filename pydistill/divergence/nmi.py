"""How informative an attention map is: the normalised mutual information between its queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydistill._renamed import renamed

__all__ = ["attention_nmi"]

_ELEMENTS = 1 << 22  # of a chunk of maps: 16 MiB in float32


@renamed(tau="T")
def attention_nmi(q: Tensor, k: Tensor, *, T: float | None = None) -> Tensor:
    """Normalised mutual information ``I(q; k) / sqrt(H(q) H(k))`` of each head's map ``softmax(q k^T / T)``.

    With p(q) = 1 / N and p(k | q) the map: 0 where all queries attend alike, 1 where each attends to a key of its own.
    UNIP (Zhang et al., ICLR 2025) distils the layer whose average is neither. The average over samples and heads is
    ``attention_nmi(q, k).mean()``. Equivalent, for one head with ``p = softmax(q @ k.T / T, -1)``, to
    ``(p * (p / p.mean(0)).log()).sum(-1).mean() / (log(N) * -(p.mean(0) * p.mean(0).log()).sum()).sqrt()``.

    Maps are made a few heads at a time, so that they take 16 MiB in float32 (or one head's map if that is larger).

    Args:
        q: queries ``[..., N, d]``; float32, float64, bfloat16 or float16. Arithmetic is in float32 (float64 for
            float64), without gradient.
        k: keys ``[..., M, d]`` with q's leading dimensions.
        T: what scores are divided by; ``sqrt(d)`` by default.

    Returns:
        ``[...]``, a value per head, float32 or float64, in [0, 1] up to rounding. Zero if N or M is one, whose entropy
        is zero, and if all queries attend to one key.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: shapes, devices or ``T`` do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() < 2 or 0 in x.shape[-2:]:
            raise ValueError(f"{name}: expected [..., rows, features] with one of each at least, got {list(x.shape)}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k: expected leading dimensions (heads) {list(q.shape[:-2])} and {q.shape[-1]} features as q, "
            f"got {list(k.shape[:-2])} and {k.shape[-1]}"
        )
    if k.device != q.device or k.dtype != q.dtype:
        raise ValueError(f"k: expected {q.dtype} on {q.device} as q, got {k.dtype} on {k.device}")
    if T is None:
        T = math.sqrt(q.shape[-1])
    elif not (isinstance(T, int | float) and math.isfinite(T) and T > 0):
        raise ValueError(f"T: expected a positive number, got {T!r}")
    N, M = q.shape[-2], k.shape[-2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunk = max(1, _ELEMENTS // (N * M))
    heads = math.prod(q.shape[:-2])
    with torch.no_grad():
        queries, keys = (x.reshape(heads, *x.shape[-2:]).split(chunk) for x in (q, k))
        found = [_of_heads(a.to(compute), b.to(compute), T) for a, b in zip(queries, keys, strict=True)]
        return torch.cat(found).reshape(q.shape[:-2])


def _of_heads(q: Tensor, k: Tensor, T: float) -> Tensor:
    """[G, N, d], [G, M, d] -> [G]: I = H(k) - H(k | q), of which the second is the rows' mean entropy."""
    log_p = (q @ k.mT / T).log_softmax(-1)  # [G, N, M]
    p = log_p.exp()
    of_keys = _entropy(p.mean(1))
    information = of_keys - _entropy(p).mean(1)
    if q.shape[1] == 1:
        return 0 * of_keys
    shared = information / (math.log(q.shape[1]) * of_keys).sqrt()
    # if all attend to one key, the entropy is zero up to rounding, and nothing is shared
    return torch.where(of_keys <= torch.finfo(q.dtype).eps, torch.zeros_like(shared), shared)


def _entropy(p: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(p).sum(-1)
