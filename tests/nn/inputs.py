"""What the networks are called with."""

import torch


def images(dtype=torch.float64, **options):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(**options).requires_grad_()
