"""Greedy graph cut: the bins of Dataset Quantization (Zhou et al., ICCV 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill import ops
from pydistill._arguments import check_whole
from pydistill.ops.graph_cut_greedy import check_samples

__all__ = ["graph_cut_greedy"]


@torch.no_grad()
def graph_cut_greedy(
    embeddings: Tensor, budget: int, *, factors: Tensor | None = None, lam: float = 1.0, bins: int = 1
) -> Tensor:
    """Picks samples one by one, each the one that maximises the graph-cut gain, in bins of ``budget``.

    With ``s(i, j) = 0.5 + 0.5 cos(i, j)``, D the samples in no earlier bin and S those picked for this one::

        gain(j) = lam * s[D][:, j].sum() - 2 * s[S][:, j].sum();      S.append(gain.argmax())

    The picks are those of that loop over the whole matrix s, which is never formed: memory is O(N d). A pick takes
    one pass over N numbers, up to 16 N with factors, and O(d), or O(C d), for each sample that the bounds do not rule
    out; embeddings without any structure leave so many that it takes O(N d).

    Gains are float64; those less than 1e-9 apart are ties, and the lowest index wins. So the picks do not depend on the
    number of threads or the instruction set, unless two gains differ by 1e-9 to within float64's rounding. The work is
    done on the CPU.

    Args:
        embeddings: floating ``[N, d]``, such as the features before a classifier.
        budget: picks for each bin.
        factors: floating ``[N, C]``, the gradients of the loss in the logits: the similarity is then that of the
            classifier's gradients ``[b, b (x) e]``, as in the paper's code, from ``d + C`` numbers per sample.
        lam: weight of the similarity to all of D, at least 0.
        bins: disjoint bins, one after the other, each from what is left.

    Returns:
        int64 ``[budget]`` in the order of the picks; ``[bins, budget]`` for several bins.

    Raises:
        ValueError: ``bins * budget`` is not in 1..N, lam is negative, or the embeddings or factors have a wrong shape,
            or values that are not finite.
    """
    check_samples(embeddings, factors)
    check_whole("budget", budget)
    check_whole("bins", bins)
    if bins < 1 or (bins > 1 and bins * budget > len(embeddings)):
        raise ValueError(f"budget: expected 1..N in all for {len(embeddings)} embeddings, got {bins} bins of {budget}")
    e, b = embeddings.cpu(), None if factors is None else factors.cpu()
    left = torch.arange(len(embeddings), device="cpu")
    picked = []
    for _ in range(bins):
        if len(left) < len(embeddings):
            picks = ops.graph_cut_greedy(e[left], budget, factors=None if b is None else b[left], lam=lam)
        else:
            picks = ops.graph_cut_greedy(e, budget, factors=b, lam=lam)
        picked.append(left[picks])
        remains = torch.ones(len(left), dtype=torch.bool, device="cpu")
        remains[picks] = False
        left = left[remains]
    return (torch.stack(picked) if bins > 1 else picked[0]).to(embeddings.device)
