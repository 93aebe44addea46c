"""Picks of the greedy graph cut for one bin; `pydistill.select.graph_cut_greedy` fills several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from pydistill import reference
from pydistill._arguments import check_whole
from pydistill.ops._operator import choose_backend

BACKENDS = ("reference", "cpu")


@torch.no_grad()
def graph_cut_greedy(
    embeddings: Tensor, budget: int, *, factors: Tensor | None = None, lam: float = 1.0, backend: str = "auto"
) -> Tensor:
    """As `pydistill.select.graph_cut_greedy` with ``bins=1``, which defines what is computed.

    Args:
        embeddings: floating ``[N, d]``, N, d >= 1, finite.
        budget: picks, 1..N.
        factors: floating ``[N, C]``, finite.
        lam: at least 0.
        backend: "auto" (the device's kernel), "reference" (plain torch and the matrix of all pairs, any device) or
            "cpu".

    Returns:
        int64 ``[budget]`` in the order of the picks.

    Raises:
        ValueError: the budget is not in 1..N, lam is negative, or a shape or value is not as described.
        NotImplementedError: the backend cannot run here.
    """
    check_samples(embeddings, factors)
    if factors is not None and factors.device != embeddings.device:
        raise ValueError(f"factors: expected device {embeddings.device} as the embeddings, got {factors.device}")
    check_whole("budget", budget)
    if not 1 <= budget <= len(embeddings):
        raise ValueError(f"budget: expected 1..N for {len(embeddings)} embeddings, got {budget}")
    if not 0 <= lam < float("inf"):
        raise ValueError(f"lam: expected a number of at least 0, got {lam}")
    if choose_backend("graph_cut_greedy", backend, embeddings.device, BACKENDS) == "reference":
        return reference.graph_cut_greedy(embeddings, budget, factors=factors, lam=lam)
    double = torch.float64 in (embeddings.dtype, factors is not None and factors.dtype)
    dtype = torch.float64 if double else torch.float32  # as they are stored; sums are in float64
    return _raw(embeddings.detach().to(dtype), None if factors is None else factors.detach().to(dtype), lam, budget)


def check_samples(embeddings: Tensor, factors: Tensor | None) -> None:
    """Raises ValueError for anything but finite, floating ``[N, d]`` and ``[N, C]``."""
    check_rows("embeddings", embeddings)
    if factors is not None:
        check_rows("factors", factors)
        if len(factors) != len(embeddings):
            wanted = f"[{len(embeddings)}, C], a row for each of the embeddings"
            raise ValueError(f"factors: expected {wanted}, got {list(factors.shape)}")


def check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 2 or not x.is_floating_point() or 0 in x.shape:
        got = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"{name}: expected floating [N, d] with a row and a column at least, got {got}")
    if not torch.stack(x.aminmax()).isfinite().all():  # these propagate NaN
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got others in row {row}")


def _fake(embeddings: Tensor, factors: Tensor | None, lam: float, budget: int) -> Tensor:
    return torch.empty(budget, dtype=torch.int64, device=embeddings.device)


def _vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
    raise NotImplementedError("graph_cut_greedy: vmap is not supported; picks are made one after the other")


_raw = torch.ops.pydistill.graph_cut_greedy.default
torch_library.register_fake("pydistill::graph_cut_greedy", _fake)
torch_library.register_vmap("pydistill::graph_cut_greedy", _vmap)
