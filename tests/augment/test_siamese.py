"""The family's draws and results against the method repositories' function, rewritten here."""

import math

import pytest
import torch
import torch.nn.functional as F

import pydistill
from pydistill.augment import DiffAugment, diff_augment
from pydistill.augment.siamese import OPERATIONS
from pydistill.ops.augment import COLUMNS, IDENTITY
from pydistill.trajectory import FlatModule
from tests.matrices import sample

EVERYTHING = "_".join(OPERATIONS)


class Parameters:
    """What the repositories pass as parameters."""

    aug_mode = "S"
    prob_flip, ratio_scale, ratio_rotate, ratio_crop_pad, ratio_cutout = 0.5, 1.2, 15.0, 0.125, 0.5
    brightness, saturation, contrast = 1.0, 2.0, 0.5


def repository_augment(x, strategy, seed, param, align_corners=True):
    """One image at a time and one random number after the other, by torch's default generator."""
    B, C, H, W = x.shape
    state = {"seed": seed}

    def random(draw):
        if seed == -1:
            return draw()
        torch.manual_seed(state["seed"])
        state["seed"] += 1
        values = draw()
        return values[:1].expand(values.shape)

    def uniform(dtype=torch.float32):
        return random(lambda: torch.rand(B, dtype=dtype)).tolist()

    def integer(low, high):
        return random(lambda: torch.randint(low, high, (B,))).tolist()

    def sampled(image, theta):
        theta = torch.tensor(theta)[None].to(image.dtype)
        grid = F.affine_grid(theta, [1, C, H, W], align_corners=align_corners)
        return F.grid_sample(image[None], grid, align_corners=align_corners)[0]

    names = strategy.split("_")
    if param.aug_mode == "S":
        names = [names[int(random(lambda: torch.randint(0, len(names), (1,))))]]
    images = list(x)
    for name in names:
        if name == "color":
            images = [image + (u - 0.5) * param.brightness for image, u in zip(images, uniform(x.dtype), strict=True)]
            images = [
                (image - image.mean(0)) * (u * param.saturation) + image.mean(0)
                for image, u in zip(images, uniform(x.dtype), strict=True)
            ]
            images = [
                (image - image.mean()) * (u + param.contrast) + image.mean()
                for image, u in zip(images, uniform(x.dtype), strict=True)
            ]
        elif name == "crop":
            far = [int(side * param.ratio_crop_pad + 0.5) for side in (H, W)]
            down, across = (integer(-f, f + 1) for f in far)
            for n, (dy, dx) in enumerate(zip(down, across, strict=True)):
                padded = F.pad(images[n], (far[1], far[1], far[0], far[0]))
                images[n] = padded[:, far[0] + dy : far[0] + dy + H, far[1] + dx : far[1] + dx + W]
        elif name == "cutout":
            size = [int(side * param.ratio_cutout + 0.5) for side in (H, W)]
            rows, columns = (integer(0, side + (1 - s % 2)) for side, s in zip((H, W), size, strict=True))
            for n, centre in enumerate(zip(rows, columns, strict=True)):
                mask = torch.ones(H, W, dtype=x.dtype)
                for i in range(size[0]):
                    for j in range(size[1]):
                        a = min(max(i + centre[0] - size[0] // 2, 0), H - 1)
                        b = min(max(j + centre[1] - size[1] // 2, 0), W - 1)
                        mask[a, b] = 0
                images[n] = images[n] * mask
        elif name == "flip":
            images = [
                image.flip(2) if u < param.prob_flip else image for image, u in zip(images, uniform(), strict=True)
            ]
        elif name == "scale":
            least = 1.0 / param.ratio_scale
            factors = [[u * (param.ratio_scale - least) + least for u in uniform()] for _ in range(2)]
            images = [
                sampled(image, [[sx, 0.0, 0.0], [0.0, sy, 0.0]]) for image, sx, sy in zip(images, *factors, strict=True)
            ]
        elif name == "rotate":
            angles = [(u - 0.5) * 2 * param.ratio_rotate / 180 * math.pi for u in uniform()]
            images = [
                sampled(image, [[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
                for image, a in zip(images, angles, strict=True)
            ]
    return torch.stack(images)


def images_of(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", [-1, 12345])
@pytest.mark.parametrize("strategy", [*OPERATIONS, EVERYTHING])
@pytest.mark.parametrize("mode", ["S", "M"])
def test_diff_augment_is_the_repositories_function(strategy, mode, seed):
    """The same parameters from the same random numbers, and so the same images and gradients."""
    param = Parameters()
    param.aug_mode = mode
    for shape in ((3, 3, 32, 32), (2, 1, 28, 28), (2, 3, 9, 12)):
        for run in range(4):
            x = images_of(*shape).requires_grad_()
            torch.manual_seed(run)
            truth = repository_augment(x, strategy, seed if seed == -1 else seed + run, param)
            after = torch.rand(1)
            torch.manual_seed(run)
            actual = diff_augment(x, strategy, seed if seed == -1 else seed + run, param)
            if seed == -1:
                assert torch.equal(torch.rand(1), after), "not the same number of draws"
            torch.testing.assert_close(actual, truth, rtol=0, atol=1e-5)
            weights = images_of(*shape)
            grads = (torch.autograd.grad(out, x, weights)[0] for out in (actual, truth))
            torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 12345])
@pytest.mark.parametrize("align_corners", [True, False])
def test_diff_augment_draws_colours_in_the_dtype_of_the_images(seed, align_corners):
    param = Parameters()
    param.aug_mode = "M"
    x = images_of(3, 3, 9, 12, dtype=torch.float64)
    torch.manual_seed(5)
    truth = repository_augment(x, EVERYTHING, seed, param, align_corners)
    torch.manual_seed(5)
    actual = diff_augment(x, EVERYTHING, seed, param, align_corners=align_corners)
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["scale", "rotate"])
def test_diff_augment_takes_either_grid_of_the_repositories(strategy):
    """It makes no difference for square images, but for others it does."""
    for shape in ((2, 3, 9, 12), (2, 3, 8, 8)):
        x, found = images_of(*shape), {}
        for align_corners in (True, False):
            torch.manual_seed(0)
            truth = repository_augment(x, strategy, -1, Parameters(), align_corners)
            torch.manual_seed(0)
            found[align_corners] = diff_augment(x, strategy, align_corners=align_corners)
            torch.testing.assert_close(found[align_corners], truth, rtol=0, atol=1e-5)
        apart = (found[True] - found[False]).abs().max()
        assert (apart > 1e-2) == (strategy == "rotate" and shape[2] != shape[3])
        assert apart > 1e-2 or apart < 1e-5


def test_diff_augment_leaves_the_default_generator_alone_where_a_seed_is_given():
    before = torch.get_rng_state()
    out = diff_augment(images_of(3, 3, 8, 8), EVERYTHING, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, diff_augment(images_of(3, 3, 8, 8), EVERYTHING, seed=3, param=Parameters()))


@pytest.mark.parametrize("strategy", ["none", "None", ""])
def test_no_strategy(strategy):
    x, augment = images_of(2, 3, 8, 8), DiffAugment(strategy)
    assert diff_augment(x, strategy) is x
    assert augment(x, augment.draw(x.shape)) is x
    doubled = DiffAugment(strategy, flip_batch=True)
    assert torch.equal(doubled(x, doubled.draw(x.shape)), torch.cat([x, x.flip(3)]))


def columns(record):
    return dict(zip(COLUMNS, record.unbind(1), strict=True))


def uniform_on(values, low, high):
    """Kolmogorov-Smirnov at a level of about 1e-6."""
    ranks = torch.arange(1, len(values) + 1) / len(values)
    position = ((values.sort().values - low) / (high - low)).double()
    return bool((position >= 0).all() and (position <= 1).all()) and (position - ranks).abs().max() < (
        2.7 / len(values) ** 0.5
    )


def integers_on(values, low, high):
    """All of low..high and nothing else, equally often within six standard deviations."""
    counts = torch.bincount((values - low).long(), minlength=high - low + 1).double()
    if len(counts) != high - low + 1 or values.min() < low:
        return False
    share = 1 / len(counts)
    return bool(((counts / len(values) - share).abs() < 6 * (share / len(values)) ** 0.5).all())


def test_draws_of_all_operations():
    N, H, W = 20000, 32, 27
    found = columns(DiffAugment(mode="all").draw((N, 3, H, W), torch.Generator().manual_seed(0)))
    assert uniform_on(found["brightness"], -0.5, 0.5)
    assert uniform_on(found["saturation"], 0, 2)
    assert uniform_on(found["contrast"], 0.5, 1.5)
    assert integers_on(found["crop_y"], -4, 4)
    assert integers_on(found["crop_x"], -3, 3)
    assert (found["cutout_height"] == 16).all()
    assert (found["cutout_width"] == 14).all()
    assert integers_on(found["cutout_top"], 0 - 8, 32 - 8)  # an even size: centres 0 to 32
    assert integers_on(found["cutout_left"], 0 - 7, 27 - 7)
    odd = columns(DiffAugment("cutout").draw((N, 3, 30, 9), torch.Generator().manual_seed(0)))
    assert integers_on(odd["cutout_top"], 0 - 7, 29 - 7)  # size 15, centres 0 to 29
    assert integers_on(odd["cutout_left"], 0 - 2, 8 - 2)
    assert integers_on(found["flip"], 0, 1)
    for axis in "xy":
        assert uniform_on(found[f"scale_{axis}"], 1 / 1.2, 1.2)
    assert uniform_on(found["angle"], -math.pi / 12, math.pi / 12)
    numbers = torch.stack([v for k, v in found.items() if k not in ("cutout_height", "cutout_width")])
    correlations = torch.corrcoef(numbers.double()) - torch.eye(len(numbers))
    assert correlations.abs().max() < 6 / N**0.5


def test_ratios_are_used():
    ratios = {"prob_flip": 0.9, "ratio_scale": 2.0, "ratio_rotate": 90.0, "ratio_crop_pad": 0.5, "ratio_cutout": 0.25}
    ratios |= {"brightness": 4.0, "saturation": 6.0, "contrast": 0.1}
    augment = DiffAugment(mode="all", **ratios)
    found = columns(augment.draw((20000, 3, 16, 16), torch.Generator().manual_seed(0)))
    assert abs(found["flip"].mean() - 0.9) < 0.02
    assert uniform_on(found["scale_y"], 0.5, 2)
    assert uniform_on(found["angle"], -math.pi / 2, math.pi / 2)
    assert integers_on(found["crop_x"], -8, 8)
    assert (found["cutout_width"] == 4).all()
    assert uniform_on(found["brightness"], -2, 2)
    assert uniform_on(found["saturation"], 0, 6)
    assert uniform_on(found["contrast"], 0.1, 1.1)
    for name, value in ratios.items():
        assert f"{name}={value}" in repr(augment)
    assert "strategy='color_crop_cutout_flip_scale_rotate', siamese=False, mode='all', flip_batch=False" in repr(
        augment
    )


def test_one_operation_a_call():
    """The others stay at their identity; each is drawn equally often, one named twice twice as often."""
    active = {"brightness": "color", "crop_y": "crop", "cutout_height": "cutout", "flip": "flip"}
    active |= {"scale_x": "scale", "angle": "rotate"}
    generator, counts = torch.Generator().manual_seed(0), dict.fromkeys(OPERATIONS, 0)
    augment = DiffAugment(EVERYTHING + "_crop")
    for _ in range(3000):
        found = columns(augment.draw((16, 3, 32, 32), generator))
        moved = {active[c] for c in active if (found[c] != IDENTITY[c]).any()}
        assert len(moved) == 1
        for name in moved:
            counts[name] += 1
    for name, count in counts.items():
        share = 2 / 7 if name == "crop" else 1 / 7
        assert abs(count / 3000 - share) < 6 * (share / 3000) ** 0.5, counts


def test_siamese_draws_are_shared_and_others_are_not():
    for flip_batch in (False, True):
        rows = 14 if flip_batch else 7
        shared = DiffAugment(siamese=True, mode="all", flip_batch=flip_batch).draw((7, 3, 16, 16))
        own = DiffAugment(mode="all", flip_batch=flip_batch).draw((7, 3, 16, 16))
        assert shared.shape == own.shape == (rows, 13)
        assert (shared == shared[0]).all()
        assert len(own[:, 0].unique()) == rows
    x = images_of(1, 3, 16, 16).expand(5, -1, -1, -1)
    augment = DiffAugment(siamese=True, mode="all")
    out = augment(x, augment.draw(x.shape))
    assert (out == out[0]).all()


def test_a_record_replays_bitwise():
    x = images_of(6, 3, 16, 16)
    for options in ({}, {"siamese": True}, {"mode": "all"}, {"mode": "all", "flip_batch": True}):
        augment = DiffAugment(**options)
        for seed in range(8):
            record = augment.draw(x.shape, torch.Generator().manual_seed(seed))
            assert record.dtype == torch.float32
            assert torch.equal(record, augment.draw(x.shape, torch.Generator().manual_seed(seed)))
            assert torch.equal(augment(x, record), augment(x, record.clone()))
    torch.manual_seed(3)
    record = augment.draw(x.shape)
    assert torch.equal(record, augment.draw(x.shape, torch.Generator().manual_seed(3)))


BAD = [
    ({"strategy": "color_blur"}, ValueError, "color, crop, cutout, flip, scale, rotate.* got 'blur' in 'color_blur'"),
    ({"strategy": "color-crop"}, ValueError, "got 'color-crop' in"),
    ({"strategy": "flip_none"}, ValueError, "got 'none' in 'flip_none'"),
    ({"strategy": None}, TypeError, "strategy: expected a str, got NoneType"),
    ({"mode": "S"}, ValueError, "mode: expected 'single' or 'all', got 'S'"),
    ({"strategy": "flip_color", "mode": "all"}, ValueError, "mode='all' applies operations in the order color_crop"),
    ({"strategy": "flip_flip", "mode": "all"}, ValueError, "mode='all' applies operations in the order color_crop"),
    ({"prob_flip": 1.5}, ValueError, "prob_flip: expected a finite number from 0 to 1, got 1.5"),
    ({"ratio_scale": 0.5}, ValueError, "ratio_scale: expected a finite number >= 1, got 0.5"),
    ({"brightness": float("nan")}, ValueError, "brightness: expected a finite number >= 0, got nan"),
    ({"ratio_rotate": float("inf")}, ValueError, "ratio_rotate: expected a finite number >= 0, got inf"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DiffAugment(**options)


def test_diff_augment_refuses_other_modes():
    param = Parameters()
    param.aug_mode = "multiple"
    with pytest.raises(ValueError, match=r"param.aug_mode: expected 'S' or 'M', got 'multiple'"):
        diff_augment(images_of(1, 3, 8, 8), "color", param=param)


class ByHand:
    """FYI's batch as built in its repository: the images and their mirror images, then the augmentation."""

    def __init__(self, augment):
        self.augment = augment

    def draw(self, shape, generator):
        return self.augment.draw((2 * shape[0], *shape[1:]), generator)

    def __call__(self, images, record):
        return self.augment(torch.cat([images, images.flip(3)]), record)


def students(E=None, own_labels=False, label_kind="probs", N=6):
    torch.manual_seed(0)
    net = pydistill.nn.ConvNet(3, 4, width=6, depth=2, image_size=8).double()
    P = FlatModule(net).parameters()
    theta0 = P if E is None else P + 0.1 * torch.randn(E, len(P), dtype=torch.float64)
    images = images_of(N, 3, 8, 8, dtype=torch.float64)
    shape = (E, N, 4) if own_labels else (N, 4)
    labels = torch.randn(shape, dtype=torch.float64).softmax(-1)
    return net, theta0, images, labels if label_kind == "probs" else labels.argmax(-1)


def outer_gradients(mode, augment, **options):
    net, theta0, images, labels = students(options.pop("E", None), options.pop("own_labels", False))
    target = theta0.flatten()[: theta0.shape[-1]] + 0.1
    leaves = [t.clone().requires_grad_() for t in (theta0, images, labels, torch.tensor(0.05).double())]
    theta = pydistill.unroll(
        net,
        leaves[0],
        leaves[1],
        leaves[2],
        leaves[3],
        steps=4,
        label_kind="probs",
        augment=augment,
        mode=mode,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    return torch.autograd.grad((theta - target).square().sum(), leaves)


UNROLLS = [{}, {"batch_size": 4}, {"batch_size": 4, "E": 2}, {"batch_size": 4, "E": 2, "own_labels": True}]


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("options", sample(UNROLLS, UNROLLS[1:2]), ids=str)
@pytest.mark.parametrize("flip_batch", [False, True])
def test_exact_gradients_through_an_unroll(options, engine, flip_batch):
    augment = DiffAugment(mode="all", flip_batch=flip_batch)
    truth = outer_gradients("full", augment, **options)
    actual = outer_gradients("exact", augment, engine=engine, **options)
    for a, t in zip(actual, truth, strict=True):
        assert (a - t).norm() <= 1e-9 * t.norm()
    if flip_batch:  # and against the batch doubled by hand
        by_hand = outer_gradients("full", ByHand(DiffAugment(mode="all")), **options)
        for a, t in zip(truth, by_hand, strict=True):
            assert (a - t).norm() <= 1e-9 * t.norm()


def test_labels_are_repeated_with_the_images():
    """One step against its formula, with the labels doubled by hand."""
    net, theta0, images, labels = students(label_kind="hard")
    augment = DiffAugment(mode="all", flip_batch=True)
    theta = pydistill.unroll(
        net, theta0, images, labels, 0.1, steps=1, augment=augment, generator=torch.Generator().manual_seed(2)
    )
    record = augment.draw(images.shape, torch.Generator().manual_seed(2))
    parameters = theta0.clone().requires_grad_()
    logits = torch.func.functional_call(net, FlatModule(net).unflatten(parameters), (augment(images, record),))
    loss = F.cross_entropy(logits, torch.cat([labels, labels]))
    (grad,) = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(theta, theta0 - 0.1 * grad)


@pytest.mark.parametrize("engine", ["student", "generic"])
@pytest.mark.parametrize("own_labels", sample([False, True], [False]))
def test_training_on_a_flip_batch(engine, own_labels):
    """As many steps, losses and the share of right answers over twice the images."""
    net, theta0, images, labels = students(2, own_labels, "hard")
    options = {"epochs": 3, "lr": 0.05, "batch_size": 4, "engine": engine, "train_accuracy": True}

    def train(augment):
        generators = [torch.Generator().manual_seed(e) for e in range(2)]
        return pydistill.train_students(net, theta0, images, labels, augment=augment, generator=generators, **options)

    found, truth = train(DiffAugment(mode="all", flip_batch=True)), train(ByHand(DiffAugment(mode="all")))
    for name in ("theta", "losses", "train_accuracy"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-9, atol=1e-9)
    # the mirrored copy of a symmetric image is the image itself
    symmetric = images + images.flip(3)

    def train_once(augment):
        generator = torch.Generator().manual_seed(3)
        return pydistill.train_students(
            net, theta0, symmetric, labels, augment=augment, generator=generator, **{**options, "epochs": 1}
        )

    one, two = train_once(None), train_once(DiffAugment("none", flip_batch=True))
    for name in ("theta", "losses", "train_accuracy"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9)


def test_a_number_of_images_that_is_no_multiple_is_refused():
    net, theta0, images, labels = students()
    for wrong in (lambda x: x[:-1], lambda x: torch.cat([x, x[:1]])):
        with pytest.raises(ValueError, match=r"augment: expected as many images as before, or a multiple, got [57] of"):
            pydistill.unroll(net, theta0, images, labels, 0.1, steps=1, label_kind="probs", augment=wrong)
