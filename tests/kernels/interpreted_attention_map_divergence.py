"""The Triton kernels of attention_map_divergence in Triton's interpreter, against plain torch.

Not collected by itself: `test_attention_map_divergence_triton.py` runs this file in a process of its own, because the
interpreter has to be on (TRITON_INTERPRET=1) before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydistill import reference
from pydistill.ops import attention_map_divergence
from pydistill.testing import assert_close
from tests.divergence.edges import check_attention

KINDS = ("fkl", "rkl", "jsd", "ce")
OPS = torch.ops.pydistill_triton


def problem(lead: tuple[int, ...], N: int, M: int, d_s: int, d_t: int, shared: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(N * M)
    shapes = [(*lead, N, d_s), (M, d_s) if shared else (*lead, M, d_s), (*lead, N, d_t), (*lead, M, d_t)]
    if shared:
        shapes[3] = (M, d_t)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def solve(function, tensors: list[Tensor], dtype: torch.dtype, **options) -> tuple[Tensor, ...]:
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q_s, k_s)]
    loss = function(*leaves, q_t, k_t, **options)
    weights = torch.linspace(0.5, 2, max(1, loss.numel()), dtype=torch.float64).to(dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, weights)


def compare(tensors: list[Tensor], dtype: torch.dtype, **options) -> None:
    rounded = [x.to(dtype).double() for x in tensors]
    truth = solve(reference.attention_map_divergence, rounded, torch.float64, **options)
    plain = solve(reference.attention_map_divergence, tensors, dtype, **options)
    found = solve(attention_map_divergence, tensors, dtype, backend="triton", **options)
    for i, name in enumerate(("loss", "grad_q", "grad_k")):
        assert found[i].dtype == dtype
        assert_close(f"{options} {name}", found[i], truth[i], plain[i], rtol=max(1e-5, 16 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_plain_torch(dtype: torch.dtype, kind: str, reduction: str) -> None:
    for shape in [((2, 3), 7, 11, 5, 9), ((1,), 70, 67, 16, 32), ((), 64, 64, 64, 20)]:
        compare(problem(*shape), dtype, kind=kind, reduction=reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str) -> None:
    causal = torch.ones(40, 40, dtype=torch.bool).tril()  # of the second block of keys the first rows have none
    keys = torch.rand(2, 1, 1, 40) < 0.5
    late = torch.arange(40) > 36  # none in the first block
    for lead, mask in [((), causal), ((), causal.flip(1)), ((2, 2), keys), ((), late)]:
        tensors = problem(lead, 40, 40, 8, 8)
        compare(tensors, torch.float32, kind=kind, mask=mask)
        compare(tensors, torch.float32, kind=kind, mask=mask, reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_shared_keys_wide_heads_and_options(kind: str) -> None:
    compare(problem((2, 3), 5, 40, 8, 6, shared=True), torch.float32, kind=kind)
    compare(problem((1,), 33, 35, 100, 128), torch.float32, kind=kind, T_s=3.0, T_t=2.0, beta=0.2)
    transposed = [x.mT.contiguous().mT for x in problem((2,), 9, 10, 8, 6)]
    compare(transposed, torch.float32, kind=kind)


def test_a_row_without_keys_is_nan_and_alone_in_that() -> None:
    q_s, k_s, q_t, k_t = (x.float()[None, None] for x in problem((), 5, 6, 4, 4))
    mask = (torch.ones(5, 6, dtype=torch.bool) & (torch.arange(5) != 2)[:, None])[None, None]
    for kind in range(len(KINDS)):
        loss, _, _ = OPS.attention_map_divergence(q_s, k_s, q_t, k_t, mask, 0.5, 0.5, kind, 0.5, False, False, False)
        assert loss.isnan().flatten().tolist() == [False, False, True, False, False]


def test_nan_shows_where_it_is() -> None:
    q_s, k_s, q_t, k_t = (x.float() for x in problem((), 5, 6, 4, 4))
    q_s[3, 1] = torch.nan
    for kind in KINDS:
        loss = attention_map_divergence(q_s, k_s, q_t, k_t, kind=kind, reduction="none", backend="triton")
        assert loss.isnan().tolist() == [False, False, False, True, False]


def test_no_queries() -> None:
    q, k = torch.randn(2, 0, 4), torch.randn(2, 3, 4, requires_grad=True)
    loss = attention_map_divergence(q, k, q, k.detach(), reduction="sum", backend="triton")
    (grad,) = torch.autograd.grad(loss, k)
    assert loss == 0
    assert torch.equal(grad, torch.zeros(2, 3, 4))


def test_equal_bits_from_run_to_run() -> None:
    tensors = problem((2,), 70, 70, 8, 8)
    runs = [solve(attention_map_divergence, tensors, torch.float32, backend="triton", kind="jsd") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registrations() -> None:
    q_s, k_s, q_t, k_t = (x.float()[None] for x in problem((2,), 5, 6, 4, 4))
    tail = (0.5, 0.5, 0, 0.5)
    torch.library.opcheck(OPS.attention_map_divergence.default, (q_s, k_s, q_t, k_t, None, *tail, True, True, True))
    grad = torch.randn(1, 2, 5)
    args = (grad, q_s, k_s, q_t, k_t, None, *tail, True, False)
    torch.library.opcheck(OPS.attention_map_divergence_backward.default, args)


def test_what_it_has_no_kernel_for() -> None:
    tensors = problem((), 5, 6, 4, 4)
    with pytest.raises(NotImplementedError, match=r"no kernel for float64 or for more than 128 features.*float64, 4"):
        attention_map_divergence(*tensors, backend="triton")
    with pytest.raises(NotImplementedError, match=r"more than 128 features, got torch.float32, 129 and 4"):
        attention_map_divergence(*(x.float() for x in problem((), 5, 6, 129, 4)), backend="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_edges(kind: str) -> None:
    def loss(*args, **options):
        return attention_map_divergence(*args, backend="triton", **options)

    check_attention(loss, kind, torch.float32)
