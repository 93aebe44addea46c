"""Cosine similarities of embeddings, or of Kronecker products of two, without the matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill.ops.graph_cut_greedy import check_samples

_TINY = torch.finfo(torch.float64).tiny


class Cosines:
    """``cos(i, j)`` between the rows of ``embeddings``, or the rows ``[b, b (x) e]`` if ``factors`` b are given.

    For those ``<g_i, g_j> = (b_i . b_j)(1 + e_i . e_j)``: with ``[1, e]`` and ``b`` scaled to unit length the cosine is
    the product of two dot products, and the ``C (d + 1)`` numbers of a gradient are never formed. Computed in float64,
    so that choices made by it do not depend on the order of a sum. A row of length zero has cosine 0 with all.

    Raises:
        ValueError: a shape or dtype other than floating ``[N, d]`` and ``[N, C]``, or values that are not finite.
    """

    def __init__(self, embeddings: Tensor, factors: Tensor | None = None):
        check_samples(embeddings, factors)
        if factors is not None:
            embeddings = torch.nn.functional.pad(embeddings, (1, 0), value=1.0)
        self.unit = _unit(embeddings.to(torch.float64, copy=True))  # [N, d], or [N, 1 + d]
        self.factors = None if factors is None else _unit(factors.to(torch.float64, copy=True))  # [N, C]

    def __len__(self) -> int:
        return len(self.unit)

    def __getitem__(self, rows: Tensor) -> Cosines:
        """Those of some rows only."""
        part = object.__new__(Cosines)
        part.unit = self.unit.index_select(0, rows)
        part.factors = None if self.factors is None else self.factors.index_select(0, rows)
        return part

    def to(self, other: Cosines) -> Tensor:
        """``[len(self), len(other)]``."""
        found = self.unit @ other.unit.T
        if self.factors is None:
            return found
        assert other.factors is not None
        return found.mul_(self.factors @ other.factors.T)

    def sum(self) -> Tensor:
        """The sum of the unit vectors, ``[d]``, or of their Kronecker products, ``[C, 1 + d]``."""
        return self.unit.sum(0) if self.factors is None else self.factors.T @ self.unit

    def dot(self, vector: Tensor) -> Tensor:
        """The dot products with a vector such as `sum` gives, ``[len(self)]``: with it, the sum of cosines."""
        if self.factors is None:
            return self.unit @ vector
        return (self.unit @ vector.T).mul_(self.factors).sum(1)


def _unit(x: Tensor) -> Tensor:
    """In place."""
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(_TINY))
