"""Definition of the maximum mean discrepancy under a sum of Gaussian kernels."""

import torch
from torch import Tensor


def mmd(x: Tensor, y: Tensor, kernels: int = 5, factor: float = 2.0, bandwidth: float | None = None) -> Tensor:
    """Every difference of two rows is written out: a cube of (n + m)^2 d numbers."""
    rows = torch.cat([x, y])
    n, N = len(x), len(rows)
    distances = (rows[:, None] - rows).square().sum(2)  # [N, N]
    if bandwidth is None:
        bandwidth = distances.detach().sum() / (N * N - N)
        bandwidth = torch.where(bandwidth == 0, 1, bandwidth)  # equal rows have distance zero in any units
    widths = [bandwidth / factor ** (kernels // 2) * factor**i for i in range(kernels)]
    kernel = sum(torch.exp(-distances / width) for width in widths)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
