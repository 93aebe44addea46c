"""Scalar products of two flat vectors, per row of the weight matrices in them: the basis of gradient matching.

Three operators, with F the products of (a, b):

    forward    F(a, b)
    backward   the vector-Jacobian product of F along c: linear in c and, by a symmetric matrix, in (a, b)
    jvp        F's derivative along (a_t, b_t): bilinear in (a, b) and (a_t, b_t)

Their derivatives are sums of the three again, so that the family is differentiable to any order:

    backward(c, a, b), along (u, w):  to c: jvp(a, b, u, w), to (a, b): backward(c, u, w)
    jvp(a, b, u, w), along c:         to (a, b): backward(c, u, w), to (u, w): backward(c, a, b)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill.ops._operator import Operator, choose_backend, register_filled
from pydistill.ops._rows import batch_into_rows

BACKENDS = ("reference", "cpu", "triton")

Rows = Sequence[tuple[int, int, int]]


def row_products(a: Tensor, b: Tensor, rows: Rows, *, backend: str = "auto") -> Tensor:
    """``<a, b>``, ``<a, a>``, ``<b, b>`` and ``|a - b|^2`` of each row, in one pass over both.

    Rows are those of the weight matrices in a flat gradient, as compared by the loss of "Dataset Condensation with
    Gradient Matching" (Zhao, Mopuri, Bilen, ICLR 2021). For one block of rows equivalent to
    ``x, y = (t[:, start : start + count * length].view(-1, count, length) for t in (a, b))`` and
    ``torch.stack([(x * y).sum(2), (x * x).sum(2), (y * y).sum(2), (x - y).square().sum(2)], 2)``.

    Differentiable to any order in both vectors, in reverse and forward mode, under ``torch.func`` and
    ``torch.compile``. Deterministic: equal bits across runs, thread counts and, on the CPU, instruction sets.

    Args:
        a: ``[K, P]``; float32, float64, bfloat16 or float16, any strides (copied if a vector's elements are not
            adjacent). All arithmetic is in float32 (float64 for float64).
        b: as a.
        rows: blocks of rows, ``(start, count, length)`` each: ``count`` rows of ``length`` elements, one after the
            other from element ``start`` on. Blocks are in order and do not overlap; elements outside of them are
            skipped.
        backend: "auto" (the device's kernel), "reference" (plain torch, any device), "cpu" or "triton".

    Returns:
        float32 ``[K, R, 4]`` (float64 for float64), R the total number of rows.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes, dtypes, devices or rows do not fit.
        NotImplementedError: the backend cannot run here.
    """
    flat = _check(a, b, rows)
    chosen = choose_backend("row_products", backend, a.device, BACKENDS)
    if chosen == "reference":
        return reference.row_products(a, b, rows)
    return (_triton if chosen == "triton" else _native).forward(a, b, flat)


def _check(a: Tensor, b: Tensor, rows: Rows) -> list[int]:
    """The rows as one list of numbers, after checking that everything fits."""
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if a.dim() != 2:
        raise ValueError(f"a: expected [K, P], got shape {list(a.shape)}")
    if b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        wanted, got = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (a, b))
        raise ValueError(f"b: expected {wanted} as a, got {got}")
    flat: list[int] = []
    end = 0
    for block in rows:
        if len(block) != 3 or min(block) < 0:
            raise ValueError(f"rows: expected (start, count, length), none negative, got {tuple(block)}")
        start, count, length = block
        if start < end or start + count * length > a.shape[1]:
            raise ValueError(
                f"rows: expected blocks one behind the other within {a.shape[1]} elements, got {tuple(block)} "
                f"behind element {end}"
            )
        end = start + count * length
        flat += block
    return flat


def _products_fake(a: Tensor, *rest: Any) -> Tensor:
    compute = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((a.shape[0], sum(rest[-1][1::3]), 4), dtype=compute)


def _backward_fake(grad: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


class _Operators:
    """The three operators of one library. In every formula, `saved` are the operator's tensors, `options` the rows."""

    def __init__(self, library: str):
        self.forward: Operator = Operator(
            "row_products",
            library=library,
            tensors=2,
            fake=_products_fake,
            vjp=lambda saved, options, grad: self.backward(grad, *saved, *options),
            jvp=lambda saved, options, *direction: self.jvp(*saved, *direction, *options),
            vmap=batch_into_rows(lambda *args: self.forward.raw(*args), 2),
        )
        self.backward: Operator = Operator(
            "row_products_backward",
            library=library,
            tensors=3,
            fake=_backward_fake,
            vjp=self._backward_vjp,
            jvp=self._backward_jvp,
            vmap=batch_into_rows(lambda *args: self.backward.raw(*args), 3),
        )
        self.jvp: Operator = Operator(
            "row_products_jvp",
            library=library,
            tensors=4,
            fake=_products_fake,
            vjp=self._jvp_vjp,
            jvp=self._jvp_jvp,
            vmap=batch_into_rows(lambda *args: self.jvp.raw(*args), 4),
        )

    def _backward_vjp(self, saved: tuple, options: tuple, *direction: Tensor) -> tuple:
        grad, *vectors = saved
        return self.jvp(*vectors, *direction, *options), *self.backward(grad, *direction, *options)

    def _backward_jvp(self, saved: tuple, options: tuple, grad_t: Tensor, *direction: Tensor) -> tuple:
        grad, *vectors = saved
        parts = self.backward(grad_t, *vectors, *options), self.backward(grad, *direction, *options)
        return tuple(x + y for x, y in zip(*parts, strict=True))

    def _jvp_vjp(self, saved: tuple, options: tuple, grad: Tensor) -> tuple:
        vectors, direction = saved[:2], saved[2:]
        return *self.backward(grad, *direction, *options), *self.backward(grad, *vectors, *options)

    def _jvp_jvp(self, saved: tuple, options: tuple, *tangents: Tensor) -> Tensor:
        vectors, direction = saved[:2], saved[2:]
        return self.jvp(*tangents[:2], *direction, *options) + self.jvp(*vectors, *tangents[2:], *options)


def _triton_fill(form: str) -> Any:
    def fill(outputs: Any, *args: Any) -> None:
        from pydistill.triton import row_products as kernels  # Triton need not be installed

        getattr(kernels, form)(outputs, *args)

    return fill


# kept as long as the operators: torch drops those of a garbage-collected library
_triton_library = torch_library.Library("pydistill_triton", "FRAGMENT")
register_filled(_triton_library, "row_products", _products_fake, _triton_fill("forward"))
register_filled(_triton_library, "row_products_backward", _backward_fake, _triton_fill("backward"))
register_filled(_triton_library, "row_products_jvp", _products_fake, _triton_fill("jvp"))

_native, _triton = _Operators("pydistill"), _Operators("pydistill_triton")
