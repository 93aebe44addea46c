"""The scalar products of rows in Triton: all three forms (csrc/kernels/row_products.h has their formulas).

A program owns a row of one vector and traverses it ``BLOCK`` elements at a time, each lane summing its own: the
rounding error grows with a lane's share of the row. Rows of a block have one length, so a launch is one block of rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydistill.triton._launch import run_programs

FORMS = ("forward", "backward", "jvp")
VECTORS = ("a", "b", "a_t", "b_t", "grad_a", "grad_b")
MOST = 512  # elements at a time: four per thread, so that none of the forms spills registers


@triton.jit
def _load(vector, at, inside, COMPUTE: tl.constexpr):
    # widened immediately: nothing is computed in a 16-bit type
    return tl.load(vector + at, mask=inside, other=0).to(COMPUTE)


@triton.jit(do_not_specialize=("start", "count", "length", "first", "R", *(f"{name}_next" for name in VECTORS)))
def row_products_kernel(
    a, b, a_t, b_t, grad_a, grad_b,  # [K, P], a vector's elements adjacent; None if the form does not use it
    grad, products,  # [K, R, 4]
    a_next, b_next, a_t_next, b_t_next, grad_a_next, grad_b_next,  # from one vector to the next
    start, count, length, first, R,
    BLOCK: tl.constexpr,  # a power of two
):  # fmt: skip
    COMPUTE: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    k = (tl.program_id(0) // count).to(tl.int64)
    row = (tl.program_id(0) % count).to(tl.int64)
    place = (k * R + first + row) * 4
    begin = start + row * length
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    if grad is not None:
        both = tl.load(grad + place)
        of_a, of_b = 2 * tl.load(grad + place + 1), 2 * tl.load(grad + place + 2)
        apart = 2 * tl.load(grad + place + 3)
    dot = tl.zeros((BLOCK,), COMPUTE)
    square_a = tl.zeros((BLOCK,), COMPUTE)
    square_b = tl.zeros((BLOCK,), COMPUTE)
    distance = tl.zeros((BLOCK,), COMPUTE)
    for offset in range(0, length, BLOCK):
        inside = offset + lanes < length
        at = begin + offset + lanes
        x = _load(a, k * a_next + at, inside, COMPUTE)
        y = _load(b, k * b_next + at, inside, COMPUTE)
        if grad is not None:
            d = apart * (x - y)
            to_a = both * y + of_a * x + d
            to_b = both * x + of_b * y - d
            tl.store(grad_a + k * grad_a_next + at, to_a.to(grad_a.dtype.element_ty), mask=inside)
            tl.store(grad_b + k * grad_b_next + at, to_b.to(grad_b.dtype.element_ty), mask=inside)
        elif a_t is not None:
            x_t = _load(a_t, k * a_t_next + at, inside, COMPUTE)
            y_t = _load(b_t, k * b_t_next + at, inside, COMPUTE)
            dot += x_t * y + x * y_t
            square_a += 2 * x * x_t
            square_b += 2 * y * y_t
            distance += 2 * (x - y) * (x_t - y_t)
        else:
            dot += x * y
            square_a += x * x
            square_b += y * y
            distance += (x - y) * (x - y)
    if products is not None:
        tl.store(products + place, tl.sum(dot, 0))
        tl.store(products + place + 1, tl.sum(square_a, 0))
        tl.store(products + place + 2, tl.sum(square_b, 0))
        tl.store(products + place + 3, tl.sum(distance, 0))


def arguments(tensors: dict[str, Tensor], block: tuple[int, int, int], first: int, R: int) -> dict[str, Any]:
    """The kernel's arguments for one block of rows, from tensors named like them."""
    start, count, length = block
    strides = {f"{name}_next": tensors[name].stride(0) if name in tensors else 0 for name in VECTORS}
    return {
        **{name: tensors.get(name) for name in (*VECTORS, "grad", "products")},
        **strides,
        **{"start": start, "count": count, "length": length, "first": first, "R": R},
        "BLOCK": min(MOST, max(32, triton.next_power_of_2(length))),
    }


def warps(block: int) -> int:
    """The number of warps for this many elements at a time."""
    return max(1, block // 128)


def launch(tensors: dict[str, Tensor], rows: list[int]) -> None:
    """Fills products, or grad_a and grad_b. The form follows from which of ``grad``, ``a_t`` and ``b_t`` are given.

    ``grad`` and the outputs are contiguous, and so are the rows of [K, P] tensors.
    """
    a = tensors["a"]
    blocks = [tuple(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    R, first = sum(rows[1::3]), 0
    for block in blocks:
        given = arguments(tensors, block, first, R)
        compiler = {"num_warps": warps(given["BLOCK"]), "enable_fp_fusion": False}
        run_programs(row_products_kernel, len(a) * block[1], a.device, given, **compiler)
        first += block[1]


def _dense(*vectors: Tensor) -> list[Tensor]:
    return [t if t.stride(1) == 1 else t.contiguous() for t in vectors]


def forward(products: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> None:
    """Fills ``products`` with what the operator of this name returns for the other arguments; so do the next two."""
    launch({**dict(zip(("a", "b"), _dense(a, b), strict=True)), "products": products}, rows)


def jvp(products: Tensor, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor, rows: list[int]) -> None:
    vectors = zip(("a", "b", "a_t", "b_t"), _dense(a, b, a_t, b_t), strict=True)
    launch({**dict(vectors), "products": products}, rows)


def backward(outputs: tuple[Tensor, Tensor], grad: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> None:
    grad_a, grad_b = outputs
    if sum(count * length for count, length in zip(rows[1::3], rows[2::3], strict=True)) < a.shape[1]:
        grad_a.zero_()  # elements that belong to no row
        grad_b.zero_()
    vectors = zip(("a", "b"), _dense(a, b), strict=True)
    launch({**dict(vectors), "grad_a": grad_a, "grad_b": grad_b, "grad": grad.contiguous()}, rows)
