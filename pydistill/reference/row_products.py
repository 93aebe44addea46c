"""The definition of the rows' scalar products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_products(a: Tensor, b: Tensor, rows: Sequence[tuple[int, int, int]]) -> Tensor:
    compute = torch.float64 if a.dtype == torch.float64 else torch.float32
    found = [a.new_zeros((len(a), 0, 4), dtype=compute)]
    for start, count, length in rows:
        x, y = (t[:, start : start + count * length].to(compute).reshape(len(a), count, length) for t in (a, b))
        products = [(x * y).sum(2), (x * x).sum(2), (y * y).sum(2), (x - y).square().sum(2)]
        found.append(torch.stack(products, 2))
    return torch.cat(found, 1)
