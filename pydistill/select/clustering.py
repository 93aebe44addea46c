"""K-means, and the real images nearest to its centres: where AST (Shen et al., 2023) starts its synthetic images."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill._arguments import check_whole
from pydistill.ops.graph_cut_greedy import check_rows


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, iterations: int = 50, generator: torch.Generator | None = None) -> Tensor:
    """The centres ``[k, d]`` that Lloyd's algorithm finds for the rows of ``x``, initialised by k-means++.

    Equivalent to ``sklearn.cluster.KMeans(k, n_init=1, max_iter=iterations).fit(x).cluster_centers_`` except for the
    random draws. It ends when no row changes its centre; a centre that loses all its rows stays where it is.

    Args:
        x: floating ``[N, d]``, N >= k.
        k: number of centres.
        iterations: at most this many.
        generator: draws the first centres; torch's default one on the CPU when None.

    Raises:
        ValueError: ``k`` is not in 1..N, or x has another shape.
    """
    check_rows("x", x)
    check_whole("k", k)
    check_whole("iterations", iterations, 0)
    if not 1 <= k <= len(x):
        raise ValueError(f"k: expected 1..N for x [N, d], got {k} for {list(x.shape)}")
    index = int(torch.randint(len(x), (), generator=generator, device="cpu"))
    centres = x[index : index + 1]
    while len(centres) < k:
        # from each row to its nearest centre; if all coincide with centres, any row will do
        distance = torch.cdist(x, centres).square().amin(1).cpu()
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        index = int(torch.multinomial(weights, 1, generator=generator))
        centres = torch.cat([centres, x[index : index + 1]])
    assigned = None
    for _ in range(iterations):
        nearest = torch.cdist(x, centres).argmin(1)
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        members = torch.nn.functional.one_hot(assigned, k).to(x.dtype).T  # [k, N]
        count = members.sum(1, keepdim=True)
        centres = torch.where(count > 0, members @ x / count.clamp_min(1), centres)
    return centres


@torch.no_grad()
def representatives(features: Tensor, labels: Tensor, ipc: int, generator: torch.Generator | None = None) -> Tensor:
    """For each class the ``ipc`` samples nearest to the centres of its features, classes in order.

    Args:
        features: floating ``[N, d]``, such as an expert's logits.
        labels: int64 ``[N]``, every class of 0..max in it.
        ipc: samples per class.
        generator: as for `kmeans`.

    Returns:
        int64 ``[K * ipc]``, indices into features, all different.

    Raises:
        ValueError: a class has fewer than ``ipc`` samples.
    """
    check_rows("features", features)
    check_whole("ipc", ipc, 1)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected int64 [{len(features)}], got {got}")
    chosen = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < ipc:
            raise ValueError(f"ipc: expected at most {len(members)}, the samples of class {label}, got {ipc}")
        distance = torch.cdist(kmeans(features[members], ipc, generator=generator), features[members])
        for row in distance:
            nearest = int(row.argmin())
            chosen.append(members[nearest])
            distance[:, nearest] = torch.inf  # taken
    return torch.stack(chosen)
