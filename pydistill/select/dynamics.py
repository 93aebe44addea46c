"""What training reveals about its samples: forgetting events and the area under the margin."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TrainingDynamics"]


class TrainingDynamics:
    """Follows ``num_samples`` samples through training, by the logits that they get in each epoch.

    `forgetting` counts how often a sample was classified correctly and then wrongly the next time (Toneva et al., "An
    Empirical Study of Example Forgetting", ICLR 2019); `aum` is the mean over the epochs of the margin, the logit of
    the label minus the largest other one (Pleiss et al., "Identifying Mislabeled Data", NeurIPS 2020). Three numbers
    per sample are kept, on the CPU.
    """

    def __init__(self, num_samples: int):
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self._margins = torch.zeros(num_samples, dtype=torch.float64, device="cpu")
        self._seen = torch.zeros(num_samples, dtype=torch.int64, device="cpu")
        self._forgotten = torch.zeros(num_samples, dtype=torch.int64, device="cpu")
        self._right = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
        self._learnt = torch.zeros(num_samples, dtype=torch.bool, device="cpu")

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        """Takes in one epoch's logits of some samples.

        Args:
            logits: floating ``[B, K]``, K >= 2.
            labels: int64 ``[B]`` in 0..K-1.
            index: int64 ``[B]``, which samples these are, all different; None: all of them, in order.

        Raises:
            ValueError: shapes or dtypes that do not match, labels or an index out of range, a sample twice, or logits
                that are not finite.
        """
        n = len(self._seen)
        logits, labels = logits.cpu(), labels.cpu()
        index = torch.arange(n, device="cpu") if index is None else index.cpu()
        if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise ValueError(f"logits: expected floating [B, K] with K >= 2, got {logits.dtype} {list(logits.shape)}")
        B, K = logits.shape
        for name, value, end in (("labels", labels, K), ("index", index, n)):
            if value.dtype != torch.int64 or value.shape != (B,):
                raise ValueError(f"{name}: expected int64 [{B}], got {value.dtype} {list(value.shape)}")
            if B and not 0 <= int(value.min()) <= int(value.max()) < end:
                raise ValueError(f"{name}: expected 0..{end - 1}, got {int(value.min())}..{int(value.max())}")
        if len(index.unique()) < B:
            raise ValueError("index: expected every sample once, got one twice")
        if not logits.isfinite().all():
            raise ValueError("logits: expected finite values, got others")
        margin = margins(logits.double(), labels)
        right = margin > 0
        self._margins[index] += margin
        self._seen[index] += 1
        self._forgotten[index] += (self._right[index] & ~right).long()
        self._right[index] = right
        self._learnt[index] |= right

    def forgetting(self) -> Tensor:
        """float64 ``[N]``: how often each sample was forgotten; infinity for one that was never learnt."""
        return torch.where(self._learnt, self._forgotten.double(), torch.inf)

    def aum(self) -> Tensor:
        """float64 ``[N]``: the mean margin of each sample; NaN for one that was never seen."""
        return self._margins / self._seen


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, ``[B]``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
