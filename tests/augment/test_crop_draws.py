"""Drawing crops: torchvision's distribution, mixes and their labels, CDA's curriculum, and records as bytes."""

import math
import random

import pytest
import torch

from pydistill import reference
from pydistill.augment import (
    MultiCrop,
    crop_schedule,
    mix_labels,
    mix_weights,
    record_from_bytes,
    record_to_bytes,
)
from pydistill.ops.multi_crop import COLUMNS

C = {name: i for i, name in enumerate(COLUMNS)}


def get_params(random, H, W, scale, ratio):
    """torchvision's, by its documentation: ten tries, then the centre."""
    for _ in range(10):
        area = H * W * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return random.randint(0, H - h), random.randint(0, W - w), h, w
    w, h = W, H
    if min(ratio) > W / H:
        h = round(W / min(ratio))
    elif max(ratio) < W / H:
        w = round(H * max(ratio))
    return (H - h) // 2, (W - w) // 2, h, w


@pytest.mark.parametrize(
    ("H", "W", "scale", "ratio"),
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 48, (0.3, 1.0), (3 / 4, 4 / 3)),
        (48, 20, (0.9, 1.0), (3 / 4, 4 / 3)),  # only the centre fits
        (30, 24, (0.95, 1.0), (3 / 4, 4 / 3)),  # either
        (7, 7, (0.01, 0.1), (0.5, 2.0)),
    ],
)
def test_crops_are_distributed_as_torchvisions(H, W, scale, ratio):
    """Means, spreads and the joint distribution of the boxes' sides, within five standard errors."""
    count = 20_000
    record = MultiCrop(8, scale=scale, ratio=ratio).draw((count, 3, H, W), torch.Generator().manual_seed(0))
    got = record[:, 0, [C[n] for n in ("top", "left", "height", "width")]].double()
    rng = random.Random(0)
    want = torch.tensor([get_params(rng, H, W, scale, ratio) for _ in range(count)], dtype=torch.float64)
    assert (got[:, :2] >= 0).all()
    assert (got[:, 0] + got[:, 2] <= H).all()
    assert (got[:, 1] + got[:, 3] <= W).all()
    for moments in (lambda x: x, lambda x: x.square(), lambda x: x[:, :1] * x[:, 2:], lambda x: x[:, 2:3] * x[:, 3:]):
        a, b = moments(got), moments(want)
        error = ((a.var(0) + b.var(0)) / count).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-12).all()
    # in bins, a chi square of two samples: at most its mean and five standard deviations
    bins = [((x[:, 2] * 8 / (H + 1)).floor() * 8 + (x[:, 3] * 8 / (W + 1)).floor()).long() for x in (got, want)]
    a, b = (torch.bincount(x, minlength=64).double() for x in bins)
    used = (a + b) > 0
    chi, freedom = ((a - b).square()[used] / (a + b)[used]).sum(), max(int(used.sum()) - 1, 0)
    assert chi <= freedom + 5 * math.sqrt(2 * freedom) + 1e-12


def test_flips_and_rolls():
    record = MultiCrop(8, flip=0.25, roll=3).draw((4000, 3, 9, 9), torch.Generator().manual_seed(0))[:, 0]
    assert abs(record[:, C["flip"]].mean() - 0.25) < 0.035
    for axis in ("roll_y", "roll_x"):
        counts = torch.bincount(record[:, C[axis]].long(), minlength=4)
        assert counts.shape == (4,)
        assert (counts - 1000).abs().max() < 140
    assert (MultiCrop(8, flip=0).draw((9, 3, 9, 9))[:, :, [C["flip"], C["roll_y"], C["roll_x"]]] == 0).all()
    assert (MultiCrop(8, flip=1).draw((9, 3, 9, 9))[:, :, C["flip"]] == 1).all()


def test_shared_is_one_draw_for_the_batch():
    record = MultiCrop(8, roll=4, shared=True).draw((16, 3, 40, 40), torch.Generator().manual_seed(1))
    assert torch.equal(record[:, 0, 0], torch.arange(16.0))
    assert (record[:, :, 1:] == record[:1, :, 1:]).all()
    each = MultiCrop(8, roll=4).draw((16, 3, 40, 40), torch.Generator().manual_seed(1))
    assert (each[:, :, 1:8] != each[:1, :, 1:8]).any()


def test_shared_is_what_the_repository_computes():
    """One crop of the whole batch, a flip and a roll, in the repository's order."""
    augment = MultiCrop(12, roll=5, shared=True, flip=1, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    x = torch.randn(4, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    record = augment.draw(x.shape, torch.Generator().manual_seed(2))
    _, top, left, height, width, _, *roll = record[0, 0, :8].int().tolist()
    crop = x[:, :, top : top + height, left : left + width]
    y = torch.nn.functional.interpolate(crop, (12, 12), mode="bilinear", antialias=True).flip(3).roll(roll, (2, 3))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (augment.mean, augment.std))
    torch.testing.assert_close(augment(x, record), (y - mean) / std)


def test_a_generator_repeats_its_draws():
    for mix in (None, "mixup", "cutmix", "mosaic"):
        augment = MultiCrop(8, mix=mix, roll=2)
        first, again, other = (augment.draw((6, 3, 16, 16), torch.Generator().manual_seed(s)) for s in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_mixup():
    images, labels = torch.randn(6, 3, 16, 16), torch.randn(6, 5).softmax(1)
    augment = MultiCrop(8, mix="mixup", alpha=0.8)
    record = augment.draw(images.shape, torch.Generator().manual_seed(0))
    alone = augment(images, record[:, :1])
    sources, weights = mix_weights(record, 8)
    lam = weights[0, 0]
    assert 0 < lam < 1
    torch.testing.assert_close(weights, torch.stack([lam, 1 - lam]).expand(6, 2))
    assert torch.equal(sources[:, 1].sort().values, torch.arange(6))
    torch.testing.assert_close(augment(images, record), lam * alone + (1 - lam) * alone[sources[:, 1]])
    torch.testing.assert_close(mix_labels(labels, record, 8), lam * labels + (1 - lam) * labels[sources[:, 1]])


def test_mixup_lambda_is_beta():
    augment = MultiCrop(8, mix="mixup", alpha=0.5)
    generator = torch.Generator().manual_seed(0)
    lam = torch.stack([1 - augment.draw((1, 3, 8, 8), generator)[0, 1, C["alpha"]] for _ in range(3000)])
    assert abs(lam.mean() - 0.5) < 0.035
    assert abs(lam.var() - 1 / 8) < 0.01  # 1 / (4 (2 alpha + 1))


def test_cutmix_pastes_a_box_and_labels_follow_its_area():
    images = torch.randn(5, 3, 16, 16)
    augment = MultiCrop((10, 14), mix="cutmix")
    seen = set()
    for seed in range(40):
        record = augment.draw(images.shape, torch.Generator().manual_seed(seed))
        alone, mixed = augment(images, record[:, :1]), augment(images, record)
        sources, weights = mix_weights(record, (10, 14))
        top, left, height, width = (
            record[0, 1, [C[f"to_{n}"] for n in ("top", "left", "height", "width")]].int().tolist()
        )
        inside = torch.zeros(10, 14, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(mixed, torch.where(inside, alone[sources[:, 1]], alone))
        torch.testing.assert_close(weights[:, 1], inside.float().mean().expand(5))
        assert mix_labels(torch.arange(5), record, (10, 14), num_classes=7).shape == (5, 7)
        seen.add(height * width > 0)
    assert True in seen


def test_mosaic():
    images = torch.randn(8, 3, 16, 16)
    augment = MultiCrop(9, mix="mosaic")
    sources = torch.arange(8).view(2, 4)
    record = augment.draw(images.shape, torch.Generator().manual_seed(0), sources=sources)
    out = augment(images, record)
    assert out.shape == (2, 3, 9, 9)
    found, weights = mix_weights(record, 9)
    assert torch.equal(found, sources)
    torch.testing.assert_close(weights[0], torch.tensor([16.0, 20, 20, 25]) / 81)
    _, top, left, height, width, flip = record[1, 3, :6].int().tolist()
    crop = images[7:8, :, top : top + height, left : left + width]
    tile = torch.nn.functional.interpolate(crop, 5, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(out[1, :, 4:, 4:], tile.flip(2) if flip else tile)
    drawn = augment.draw(images.shape, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 0, 0], torch.arange(8.0))
    for tile in (1, 2, 3):
        assert torch.equal(drawn[:, tile, 0].sort().values, torch.arange(8.0))


def test_weights_of_parts_that_overlap():
    record = torch.zeros(1, 4, len(COLUMNS))
    for p, (alpha, *place) in enumerate([(1, 0, 0, 8, 8), (0.5, 0, 0, 6, 6), (0.25, 2, 2, 6, 6), (1, 3, 0, 2, 8)]):
        record[0, p, C["height"]] = record[0, p, C["width"]] = 1
        record[0, p, C["source"]] = p
        record[0, p, C["to_top"] :] = torch.tensor([*place, alpha])
    images = torch.eye(4).view(4, 4, 1, 1)  # image p is one in channel p
    share = reference.multi_crop(images, record, (8, 8))[0].mean((1, 2))
    torch.testing.assert_close(mix_weights(record, 8)[1][0], share)


def test_sources_may_repeat():
    record = MultiCrop(8, mix="mixup").draw((3, 3, 9, 9), sources=torch.tensor([2, 2, 0, 1, 1]))
    assert torch.equal(record[:, 0, 0], torch.tensor([2.0, 2, 0, 1, 1]))
    assert torch.equal(record[:, 1, 0].sort().values, torch.tensor([0.0, 1, 1, 2, 2]))


def test_base_has_its_gradient():
    augment = MultiCrop(8, roll=2, shared=True)
    images, base = torch.randn(4, 3, 10, 10), torch.zeros(1, 3, 10, 10, requires_grad=True)
    record = augment.draw(images.shape)
    augment(images, record, base=base).sum().backward()
    torch.testing.assert_close(base.grad.sum(), torch.tensor(4.0 * 3 * 64))


@pytest.mark.parametrize(
    ("kind", "values"), [("step", (1, 1, 1)), ("linear", (1, 0.77, 0.54)), ("cosine", (1, 0.8653, 0.54))]
)
def test_curriculum(kind, values):
    got = [crop_schedule(kind, i, 1000, milestone=0.4) for i in (0, 100, 200)]
    assert got == pytest.approx(values, abs=1e-4)
    assert crop_schedule(kind, 400, 1000, milestone=0.4) == 0.08
    assert crop_schedule(kind, 999, 1000, milestone=0.4, lowest=0.2) == 0.2
    steps = [crop_schedule(kind, i, 100) for i in range(100)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(("mix", "size"), [(None, 29), ("mixup", 58), ("cutmix", 58), ("mosaic", 116)])
def test_bytes_replay_bitwise(mix, size):
    images = torch.randn(7, 3, 30, 30)
    augment = MultiCrop(12, roll=4, mix=mix)
    record = augment.draw(images.shape, torch.Generator().manual_seed(0))
    data = record_to_bytes(record)
    assert len(data) == 16 + 7 * size
    again = record_from_bytes(data)
    assert torch.equal(again, record)
    assert torch.equal(augment(images, again), augment(images, record))
    assert record_from_bytes(record_to_bytes(record[:0])).shape == (0, record.shape[1], len(COLUMNS))


def test_negative_rolls_replay():
    record = MultiCrop(12).draw((2, 3, 30, 30))
    record[:, :, C["roll_y"]] = -300
    assert torch.equal(record_from_bytes(record_to_bytes(record)), record)


def test_bytes_that_are_no_record_are_refused():
    record = MultiCrop(12).draw((2, 3, 30, 30))
    data = record_to_bytes(record)
    for bad, message in (
        (data[:10], "expected a record of at least 16 bytes, got 10"),
        (data[:-1], "expected 74 bytes for 2 rows of 1 parts, got 73"),
        (data + b"x", "expected 74 bytes for 2 rows of 1 parts, got 75"),
        (b"x" + data[1:], "expected a record that begins with"),
    ):
        with pytest.raises(ValueError, match=message):
            record_from_bytes(bad)
    for column, value in (
        ("top", -1.0),
        ("height", 70000.0),
        ("left", 0.5),
        ("roll_x", float("nan")),
        ("source", 2.0**25),
    ):
        spoiled = record.clone()
        spoiled[1, 0, C[column]] = value
        with pytest.raises(ValueError, match=f"record: expected whole numbers of .* as {column}, got"):
            record_to_bytes(spoiled)
    with pytest.raises(TypeError, match=r"record: expected a float32 tensor, got torch\.float64"):
        record_to_bytes(record.double())
    with pytest.raises(ValueError, match=r"record: expected shape \[B, P, 14\]"):
        record_to_bytes(record[0])


BAD = [
    ({"out_size": 0}, "out_size: expected sides of 1 to 16384"),
    ({"out_size": 1, "mix": "mosaic"}, "out_size: expected sides"),
    ({"scale": (0.0, 1.0)}, "scale: expected"),
    ({"ratio": (2.0, 1.0)}, "ratio: expected"),
    ({"flip": 1.5}, "flip: expected a probability, got 1.5"),
    ({"roll": -1}, "roll: expected"),
    ({"mix": "cut"}, "mix: expected 'mixup', 'cutmix', 'mosaic' or None, got 'cut'"),
    ({"alpha": 0.0}, "alpha: expected"),
    ({"mean": (0.5,)}, "mean, std: expected both or neither"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**{"out_size": 8, **options})


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"sources: expected shape \[B\], got \[2, 4\]"):
        MultiCrop(8).draw((9, 3, 8, 8), sources=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="sources: expected numbers of images, 0 to 8"):
        MultiCrop(8).draw((9, 3, 8, 8), sources=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="kind: expected 'step', 'linear' or 'cosine', got 'ramp'"):
        crop_schedule("ramp", 0, 1)
    with pytest.raises(ValueError, match="iteration, iterations: expected"):
        crop_schedule("step", -1, 1)
    with pytest.raises(ValueError, match="lowest: expected a share"):
        crop_schedule("step", 0, 1, lowest=0.0)
    with pytest.raises(ValueError, match="classes: expected how many"):
        mix_labels(torch.arange(3), MultiCrop(8).draw((3, 3, 8, 8)), 8)
    with pytest.raises(ValueError, match=r"labels: expected shape \[N, K\] or \[N\]"):
        mix_labels(torch.zeros(3, 2, 2), MultiCrop(8).draw((3, 3, 8, 8)), 8)
