"""Divergence between two softmax attention maps, row by row, without either map in memory.

Two operators on the heads ``[A, H, rows, features]`` of student and teacher, with f the rows' losses:

    forward    sum f and its gradients (q_s, k_s), in one sweep over the keys; or f itself
    backward   the gradients of <grad, f>, from recomputed scores

Training uses a mean or a sum, for which the cotangent of every row is the same: so gradients are computed while the
scores are at hand, and the backward pass only scales them: in place, or by a third operator if a graph of the backward
pass is wanted. Another backward pass through the same graph recomputes them. Individually weighted rows ("none")
take the second operator. All exist twice: in C++ (``torch.ops.pydistill``) and in Triton
(``torch.ops.pydistill_triton``). Only the first derivative has a formula; a second is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._arguments import check_choice
from pydistill._renamed import renamed, warn
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._rows import under_autocast, widened

BACKENDS = ("reference", "cpu", "triton")
KINDS = ("fkl", "rkl", "jsd", "ce")  # in the order of Kind in csrc/kernels/attention_map_divergence.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@renamed(tau_s="T_s", tau_t="T_t")
def attention_map_divergence(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    kind: Literal["fkl", "rkl", "jsd", "ce"] = "fkl",
    T_s: float | None = None,
    T_t: float | None = None,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's attention map ``P_s = softmax(q_s k_s^T / T_s)`` from the teacher's ``P_t``.

    For "fkl" equivalent to ``F.kl_div((q_s @ k_s.mT / T_s).log_softmax(-1), (q_t @ k_t.mT / T_t).softmax(-1),
    reduction="none").sum(-1).mean()``, exact, in memory that grows with N + M and not with N * M: on the CPU a thread
    holds a few dozen rows of scores, and one head's keys rearranged. UNIP (Zhang et al., ICLR 2025) distils a layer's
    attention this way, MiniLM (Wang et al., NeurIPS 2020) a transformer's; with keys shared by all queries it is the
    loss of ZSCL (Zheng et al., ICCV 2023) against texts and of COMODO against a queue.

    Student and teacher may differ in features, but not in heads. The gradient goes to ``q_s`` and ``k_s``, and is
    computed only if needed: for "mean" and "sum" in the forward pass, along with the loss; for "none" in the backward
    pass, which recomputes the scores, as does a second pass through the same graph. A second
    derivative raises ``NotImplementedError``, and so does forward mode. On the CPU, results have equal bits across
    runs, thread counts, and AVX2 and AVX-512; the baseline, without fused multiply-add, differs from these in
    rounding. NaN and Inf propagate.

    Args:
        q_s: the student's queries ``[..., N, d_s]``; float32, float64, bfloat16 or float16, any strides. All arithmetic
            is in float32 (float64 for float64). If dtypes differ, all are promoted to their common one.
        k_s: its keys ``[..., M, d_s]`` with q_s's leading dimensions, or ``[M, d_s]``, shared by all of them.
        q_t: the teacher's queries ``[..., N, d_t]``, with q_s's leading dimensions.
        k_t: its keys ``[..., M, d_t]`` or ``[M, d_t]``.
        kind: "fkl" is ``KL(P_t || P_s)``, "rkl" ``KL(P_s || P_t)``, "ce" ``-sum P_t log P_s``, and "jsd"
            ``beta KL(P_t || Q) + (1 - beta) KL(P_s || Q)`` with ``Q = beta P_t + (1 - beta) P_s``; in nats.
        T_s: what the student's scores are divided by; ``sqrt(d_s)`` by default.
        T_t: the teacher's; ``sqrt(d_t)`` by default.
        beta: of "jsd", between 0 and 1; the Jensen-Shannon divergence has 0.5.
        mask: bool, broadcastable to ``[..., N, M]``; keys at False take part in neither map.
        reduction: "batchmean" (the mean over rows), "sum" or "none".
        backend: "auto" (the device's kernel: C++ on the CPU, Triton on GPUs), "reference" (plain torch, any device),
            "cpu", or "triton" (not in float64, and with at most 128 features; the CPU in Triton's interpreter,
            TRITON_INTERPRET=1).

    Returns:
        A scalar, or ``[..., N]`` for reduction "none"; in the common dtype, in float32 under autocast. The mean of no
        rows is NaN, as in torch.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or option does not fit; the teacher requires a gradient (detach it); on the CPU, a
            mask leaves a row without keys. Elsewhere, and under ``vmap`` and ``torch.compile``, such a row is NaN.
        NotImplementedError: the backend cannot run here, or a second derivative is asked for.
    """
    if reduction == "mean":
        warn("attention_map_divergence: reduction 'mean' is called 'batchmean' now, as in torch", depth=2)
        reduction = "batchmean"
    _check(q_s, k_s, q_t, k_t, kind, beta, mask, reduction)
    T_s = _temperature("T_s", T_s, q_s)
    T_t = _temperature("T_t", T_t, q_t)
    chosen = choose_backend("attention_map_divergence", backend, q_s.device, BACKENDS)
    common = q_s.dtype
    for tensor in (k_s, q_t, k_t):
        common = torch.promote_types(common, tensor.dtype)
    tensors = (q_s.to(common), k_s.to(common), q_t.to(common), k_t.to(common))
    if chosen == "reference":
        return widened(reference.attention_map_divergence)(*tensors, kind, T_s, T_t, beta, mask, reduction)
    if chosen == "triton" and (common == torch.float64 or max(q_s.shape[-1], q_t.shape[-1]) > 128):
        raise NotImplementedError(
            "attention_map_divergence: backend='triton' has no kernel for float64 or for more than 128 features, got "
            f"{common}, {q_s.shape[-1]} and {q_t.shape[-1]}; backend='reference' runs anywhere"
        )
    operators = _triton if chosen == "triton" else _native

    summed = reduction != "none"
    asked = summed and torch.is_grad_enabled()
    with_q, with_k = (asked and tensor.requires_grad for tensor in (q_s, k_s))
    options = (1 / T_s, 1 / T_t, KINDS.index(kind), float(beta), summed, with_q, with_k)
    loss = operators.forward(*_as_heads(*tensors, mask), *options)[0]
    if reduction == "batchmean":
        rows = math.prod(q_s.shape[:-1])
        loss = loss / rows if rows else loss * math.nan
    elif reduction == "none":
        loss = loss.reshape(q_s.shape[:-1])
    return loss if under_autocast(q_s) else loss.to(common)


def _temperature(name: str, T: float | None, q: Tensor) -> float:
    if T is None:
        return math.sqrt(q.shape[-1])
    if not (isinstance(T, int | float) and math.isfinite(T) and T > 0):
        raise ValueError(f"{name}: expected a positive number, got {T!r}")
    return float(T)


def _check(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, kind: str, beta: float, mask: Tensor | None, reduction: str
) -> None:
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, ("batchmean", "sum", "none"))
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta!r}")
    named = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        rows = "N" if name[0] == "q" else "M"
        if tensor.dim() < 2 or tensor.shape[-1] == 0 or (rows == "M" and tensor.shape[-2] == 0):
            at_least = "a feature" if rows == "N" else "a key and a feature"
            raise ValueError(
                f"{name}: expected [..., {rows}, d_{name[2]}] with {at_least} at least, got {list(tensor.shape)}"
            )
        if tensor.device != q_s.device:
            raise ValueError(f"{name}: expected device {q_s.device} as q_s, got {tensor.device}")
        if name[2] == "t" and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a teacher without gradient, got a tensor that requires one; pass {name}.detach()"
            )
    if q_t.shape[:-1] != q_s.shape[:-1]:
        raise ValueError(
            f"q_t: expected leading dimensions (heads) {list(q_s.shape[:-2])} and {q_s.shape[-2]} queries as q_s, "
            f"got {list(q_t.shape[:-2])} and {q_t.shape[-2]}"
        )
    for name, q in (("k_s", q_s), ("k_t", q_t)):
        keys = named[name]
        if keys.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name}: expected {q.shape[-1]} features as q_{name[2]}, got {keys.shape[-1]}")
        if keys.dim() > 2 and keys.shape[:-2] != q_s.shape[:-2]:
            raise ValueError(
                f"{name}: expected leading dimensions (heads) {list(q_s.shape[:-2])} as q_s, or none, "
                f"got {list(keys.shape[:-2])}"
            )
    if k_t.shape[-2] != k_s.shape[-2]:
        raise ValueError(f"k_t: expected {k_s.shape[-2]} keys as k_s, got {k_t.shape[-2]}")
    if mask is not None:
        _check_mask(mask, q_s, k_s.shape[-2])


def _check_mask(mask: Tensor, q_s: Tensor, M: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    full = (*q_s.shape[:-1], M)
    padded = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(padded) > len(full) or any(a not in (1, b) for a, b in zip(padded, full, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(full)}, got {list(mask.shape)}")
    if mask.device != q_s.device:
        raise ValueError(f"mask: expected device {q_s.device} as q_s, got {mask.device}")
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or mask.dim() == 0:
        if mask.dim() == 0:
            raise ValueError("mask: expected [..., M] or [..., 1], got a scalar")
        return
    try:
        empty = (~mask.any(-1)).nonzero().tolist()
    except RuntimeError:  # the values of fake tensors and those under vmap are not accessible
        return
    if empty:
        raise ValueError(f"mask: expected a key at True in every row, got none in row {empty[0]} of {list(mask.shape)}")


def _as_heads(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operators' arguments, as views where strides allow: [A, H, N, d], [A, H, M, d] and a mask [A, H, N, M].

    Keys that all heads share become one head that has all the queries.
    """
    lead, N, M = q_s.shape[:-2], q_s.shape[-2], k_s.shape[-2]
    same_for_all = mask is None or mask.numel() == mask.shape[-1]
    if lead and k_s.dim() == k_t.dim() == 2 and same_for_all:
        N, lead = N * math.prod(lead), torch.Size()
        q_s, q_t = q_s.reshape(N, -1), q_t.reshape(N, -1)
        if mask is not None:
            mask = mask.reshape(-1)
    A, H = math.prod(lead[:-1]), lead[-1] if lead else 1
    keys = (k.expand(*lead, *k.shape[-2:]).reshape(A, H, M, k.shape[-1]) for k in (k_s, k_t))
    queries = (q.reshape(A, H, N, q.shape[-1]) for q in (q_s, q_t))
    (heads_k_s, heads_k_t), (heads_q_s, heads_q_t) = keys, queries
    if mask is not None:
        if len(lead) > 2 and mask.dim() > 3:  # [..., H or 1, N or 1, M or 1], where "..." has to become one dimension
            inner = mask.shape[-3:]
            alike = math.prod(mask.shape[:-3]) == 1
            mask = mask.reshape(1, *inner) if alike else mask.expand(*lead[:-1], *inner).reshape(A, *inner)
        mask = mask.expand(A, H, N, M)
    return heads_q_s, heads_k_s, heads_q_t, heads_k_t, mask


# In every formula below: `saved` are the operator's tensors, `options` are (scale_s, scale_t, kind, beta, ...).


def _gradients(q_s: Tensor, k_s: Tensor, with_q: bool, with_k: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised; those not asked for have no elements."""
    return q_s.new_empty(q_s.shape if with_q else (0,)), k_s.new_empty(k_s.shape if with_k else (0,))


def _forward_fake(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor | None, *options: Any) -> tuple:
    summed, with_q, with_k = options[4:]
    dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    loss = q_s.new_empty(() if summed else q_s.shape[:3], dtype=dtype)
    return loss, *_gradients(q_s, k_s, with_q, with_k)


def _backward_fake(
    grad: Tensor, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor | None, *options: Any
) -> tuple:
    return _gradients(q_s, k_s, *options[4:])


def _scale(grad: Tensor, grad_q: Tensor, grad_k: Tensor, q_s: Tensor, k_s: Tensor) -> tuple[Tensor, Tensor]:
    """``q_s`` and ``k_s`` are arguments only so that autograd sees, and refuses, a second derivative in them."""
    return (grad * grad_q).to(grad_q.dtype), (grad * grad_k).to(grad_k.dtype)


def _one_by_one(op: Callable[..., tuple], tensors: int) -> Any:
    """The vmap rule: one call per element of the batch, each large enough for that."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        outputs = []
        for i in range(info.batch_size):
            chosen = [
                x if dim is None or x is None else x.select(dim, i)
                for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
            ]
            outputs.append(op(*chosen, *args[tensors:]))
        stacked = tuple(torch.stack(each) for each in zip(*outputs, strict=True))
        return stacked, tuple(0 for _ in stacked)

    return rule


torch_library.impl("pydistill::attention_map_divergence_scale", "CompositeExplicitAutograd", _scale)
_scaled: Operator = Operator(
    "attention_map_divergence_scale",
    tensors=5,
    fake=_scale,
    vjp=None,
    jvp=None,
    vmap=_one_by_one(lambda *args: _scaled.raw(*args), 5),
    differentiable="once",
)


class _Operators:
    """The operators of one library, "pydistill" or "pydistill_triton"."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "attention_map_divergence",
            tensors=5,
            fake=_forward_fake,
            vjp=self._vjp,
            jvp=None,
            vmap=_one_by_one(lambda *args: self.forward.raw(*args), 5),
            kept=2,
            differentiable="once",
            library=library,
        )
        self.backward: Operator = Operator(
            "attention_map_divergence_backward",
            tensors=6,
            fake=_backward_fake,
            vjp=None,
            jvp=None,
            vmap=_one_by_one(lambda *args: self.backward.raw(*args), 6),
            differentiable="once",
            library=library,
        )

    def _vjp(self, saved: tuple, options: tuple, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:  # no gradient reaches the loss
            return (None,) * 5
        *tensors, grad_q, grad_k = saved
        *kind, summed, with_q, with_k = options
        need_q, need_k = ctx.needs_input_grad[:2]
        if not summed:
            found = self.backward(grad, *tensors, *kind, need_q, need_k)
        else:
            if need_q > with_q or need_k > with_k or getattr(ctx, "spent", False):
                # a second pass through one graph, or a transform hid that a gradient would be needed
                with torch.no_grad():
                    grad_q, grad_k = self.forward.raw(*tensors, *kind, True, need_q, need_k)[1:]
            found = _scale_in_place(grad, grad_q, grad_k) if ctx.owns_kept else None
            ctx.spent = found is not None
            found = found or _scaled(grad, grad_q, grad_k, *tensors[:2])
        return found[0] if need_q else None, found[1] if need_k else None, None, None, None


def _scale_in_place(grad: Tensor, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients, scaled in place in the kept ones; None if something else may still need those."""
    if torch.is_grad_enabled() or type(grad) is not Tensor:  # a second derivative may follow; a graph is being traced
        return None
    try:
        return grad_q.data.mul_(grad), grad_k.data.mul_(grad)
    except RuntimeError:  # under vmap, which cannot write many gradients in place of one
        return None


def _triton_fill(name: str) -> Callable[..., None]:
    def fill(outputs: tuple[Tensor, ...], *args: Any) -> None:
        from pydistill.triton import attention_map_divergence as kernels  # Triton need not be installed

        getattr(kernels, name)(outputs, *args)

    return fill


_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "attention_map_divergence", _forward_fake, _triton_fill("forward"))
register_filled(_triton_library, "attention_map_divergence_backward", _backward_fake, _triton_fill("backward"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
