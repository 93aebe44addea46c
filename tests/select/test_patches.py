"""Importance by hand, patches kept and filled, crops inside their images, mosaics tile by tile."""

import pytest
import torch
from torch import nn

from pydistill.nn import ConvNet
from pydistill.select import best_crops, drop_patches, mosaic, patch_importance


class Weighted(nn.Module):
    """Logit k is the sum of the pixels times plane k."""

    def __init__(self, planes):
        super().__init__()
        self.planes = planes  # [K, H, W]
        self.features = nn.Identity()

    def forward(self, x):
        return torch.einsum("nchw,khw->nk", self.features(x), self.planes)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_importance_without_a_layer_is_gradient_times_image():
    x = images(3, 2, 4, 6)
    net = Weighted(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    labels = torch.tensor([0, 1, 1])
    got = patch_importance(net, x, labels, 2)
    value = (x.sum(1) * net.planes[labels]).abs()  # [3, 4, 6]
    torch.testing.assert_close(got, value.view(3, 2, 2, 3, 2).mean((2, 4)))


def test_importance_of_a_layer_is_grad_cam():
    net = ConvNet(1, 3, 8, 1, 8).double().eval()
    x, labels = images(2, 1, 8, 8), torch.tensor([2, 0])
    got = patch_importance(net, x, labels, 4, layer=net.features)
    assert got.shape == (2, 2, 2)
    A = net.features(x)
    weight = net.classifier.weight[labels].view_as(A).mean((2, 3), keepdim=True)  # the classifier is linear in A
    cam = torch.nn.functional.interpolate((weight * A).sum(1, keepdim=True).relu(), size=(8, 8), mode="bilinear")
    torch.testing.assert_close(got, torch.nn.functional.avg_pool2d(cam, 4)[:, 0])
    assert not net.features._forward_hooks
    assert all(p.grad is None for p in net.parameters())


def test_the_most_important_patches_are_kept():
    x = images(2, 3, 4, 4)
    importance = torch.tensor([[[1.0, 4], [2, 3]], [[5, 5], [5, 5]]])
    for fill in ("mean", "bilinear"):
        got, kept = drop_patches(x, importance, 0.5, fill=fill)
        assert kept.tolist() == [[[False, True], [False, True]], [[True, True], [False, False]]]
        mask = kept[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x)
        assert torch.equal(got[mask], x[mask])
        assert not torch.isclose(got[~mask], x[~mask]).any()
    got, _ = drop_patches(x, importance, 0.5, fill="mean")
    torch.testing.assert_close(got[0, :, :, :2], x[0, :, :, 2:].mean((1, 2))[:, None, None].expand(-1, 4, 2))
    whole, kept = drop_patches(x, importance, 1.0)
    assert torch.equal(whole, x)
    assert kept.all()


def test_what_is_dropped_is_filled_from_its_surroundings():
    x = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    x[..., :2, :2], x[..., 10:, 10:] = 1.0, 3.0
    importance = torch.zeros(1, 6, 6)
    importance[0, 0, 0] = importance[0, 5, 5] = 1
    got, kept = drop_patches(x, importance, 2 / 36)
    assert kept.sum() == 2
    assert got.min() >= 1
    assert got.max() <= 3
    assert got[0, 0, 2, 2] == pytest.approx(1.0)  # from its nearest patch only
    assert got[0, 0, 0, 11] == pytest.approx(2.0)  # equally far from both


def test_crops_are_inside_and_the_surest_is_taken():
    # the value of a pixel is its column, and the network likes large ones
    x = torch.arange(8.0).expand(2, 1, 8, 8).contiguous()
    net = Weighted(torch.stack([torch.full((8, 8), 0.01), torch.zeros(8, 8)]))
    labels = torch.zeros(2, dtype=torch.int64)
    few, scores = best_crops(net, x, labels, crops=1, least_area=0.3, generator=torch.Generator().manual_seed(0))
    many, better = best_crops(net, x, labels, crops=50, least_area=0.3, generator=torch.Generator().manual_seed(0))
    assert few.shape == x.shape
    assert (few >= 0).all()
    assert (many <= 7).all()
    assert (better < scores).all()
    torch.testing.assert_close(better, torch.nn.functional.cross_entropy(net(many), labels, reduction="none"))
    assert many.mean() > few.mean()
    whole, _ = best_crops(net, x, labels, crops=1, least_area=1.0, factor=2)
    torch.testing.assert_close(whole, torch.nn.functional.avg_pool2d(x, 2))


def test_mosaic_tile_by_tile():
    patches = images(8, 3, 2, 5)
    got = mosaic(patches, 2)
    assert got.shape == (2, 3, 4, 10)
    for i, patch in enumerate(patches):
        image, tile = divmod(i, 4)
        row, column = divmod(tile, 2)
        assert torch.equal(got[image, :, 2 * row : 2 * row + 2, 5 * column : 5 * column + 5], patch)
    assert torch.equal(mosaic(patches, 1), patches)


X, Y = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
NET = Weighted(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_importance(NET, X, Y, 3), "patch_size: expected a divisor of 4 and 4, got 3"),
        (lambda: patch_importance(NET, X, Y[:1], 2), r"labels: expected int64 \[2\], got int64 \[1\]"),
        (lambda: patch_importance(NET, X, Y, 2, layer=nn.Identity()), "layer: expected a module .* got 0 calls"),
        (lambda: drop_patches(X, torch.zeros(2, 3, 3), 0.5), "importance: expected a grid that divides .* got 3x3"),
        (lambda: drop_patches(X, torch.zeros(1, 2, 2), 0.5), r"importance: expected \[2, h, w\], got \[1, 2, 2\]"),
        (lambda: drop_patches(X, torch.full((2, 2, 2), torch.nan), 0.5), "importance: expected finite values"),
        (lambda: drop_patches(X, torch.zeros(2, 2, 2), 0.0), r"keep: expected a share in \(0, 1\], got 0.0"),
        (lambda: drop_patches(X, torch.zeros(2, 2, 2), 0.5, fill="mae"), "fill: expected 'mean' or 'bilinear'"),
        (lambda: best_crops(NET, X, Y, crops=0), "crops, least_area: expected at least 1 .* got 0, 0.5"),
        (lambda: best_crops(NET, X, Y, factor=3), "factor: expected a divisor of 4 and 4, got 3"),
        (lambda: mosaic(X, 2), r"patches: expected \[N, C, h, w\] with N a multiple of 2\^2, got \[2, 1, 4, 4\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
