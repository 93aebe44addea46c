"""K-means finds existing clusters, and the samples nearest to them."""

import pytest
import torch

from pydistill.select import kmeans, representatives


def clusters(per_cluster=20):
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    return centres, torch.cat([c + torch.randn(per_cluster, 2, generator=generator) for c in centres])


def test_centres_are_the_means_of_what_is_nearest_to_them():
    centres, x = clusters()
    found = kmeans(x, 3, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, found).argmin(1)
    for k in range(3):
        torch.testing.assert_close(found[k], x[nearest == k].mean(0))
    assert torch.cdist(found, centres).amin(1).max() < 1
    again = kmeans(x, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, again)
    torch.testing.assert_close(kmeans(x, 1)[0], x.mean(0))


def test_rows_that_are_all_alike():
    found = kmeans(torch.ones(5, 3), 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, torch.ones(2, 3))


def test_representatives_are_near_and_different():
    centres, x = clusters()
    labels = torch.zeros(60, dtype=torch.int64)
    index = representatives(x, labels, 3, torch.Generator().manual_seed(1))
    assert len(index.unique()) == 3
    assert torch.cdist(x[index], centres).amin(1).max() < 1.5
    both = representatives(torch.cat([x, x + 100]), torch.cat([labels, labels + 1]), 2)
    assert (both[:2] < 60).all()
    assert (both[2:] >= 60).all()
    same = representatives(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 3)
    assert len(same.unique()) == 3


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"k: expected 1\.\.N for x \[N, d\], got 6 for \[5, 2\]"):
        kmeans(torch.zeros(5, 2), 6)
    with pytest.raises(ValueError, match="ipc: expected at most 2, the samples of class 1, got 3"):
        representatives(torch.zeros(5, 2), torch.tensor([0, 0, 0, 1, 1]), 3)
