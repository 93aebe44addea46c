"""Definition of the kernel ridge regression loss on features."""

import torch
from torch import Tensor


def krr_loss(
    f_real: Tensor,
    f_syn: Tensor,
    *,
    y_real: Tensor,
    y_syn: Tensor,
    lam: float = 1e-6,
    trace_detach: bool = True,
    bias: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Both kernels and the predictions in full, and a general solve."""
    if bias:
        f_real, f_syn = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (f_real, f_syn))
    k_ss, k_rs = f_syn @ f_syn.T, f_real @ f_syn.T
    ridge = lam * (k_ss.detach() if trace_detach else k_ss).trace()
    identity = torch.eye(len(f_syn), dtype=f_syn.dtype, device=f_syn.device)
    errors = (k_rs @ torch.linalg.solve(k_ss + ridge * identity, y_syn) - y_real).square()
    return errors.mean() if reduction == "mean" else errors.sum()
