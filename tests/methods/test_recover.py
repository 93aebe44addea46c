"""SRe2L, CDA, DWA and INFER: recovery against literal loops, independent batches, and what is refused."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pydistill.methods import CDA, DECOUPLED, DWA, INFER, RandomImages, SRe2L
from pydistill.methods.decoupled.recover import merge, real_images, recover
from pydistill.methods.decoupled.relabel import Relabel
from pydistill.methods.decoupled.squeeze import Teacher, squeeze
from pydistill.ops import multi_crop
from pydistill.seeding import Stream, seeded_generator
from tests.methods.teachers import SQUEEZE, make

SMALL = {"ipc": 2, "iterations": 6, "batch_size": 4, "jitter": 2}


def literal(net, x, y, records, steps, lr, r_bn, first, r_var, base=None):
    """The published loop, with hooks, autograd and torch's own Adam; ``records`` are (rows, columns) to roll by."""
    net = copy.deepcopy(net).eval()
    found = []

    def hook(module, inputs, output):
        (z,) = inputs
        flat = z.permute(1, 0, 2, 3).reshape(z.shape[1], -1)
        mean, var = flat.mean(1), flat.var(1, unbiased=False)
        found.append((module.running_mean - mean).norm() + r_var * (module.running_var - var).norm())

    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(hook)
    moved = (x if base is None else base).clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=lr, betas=(0.5, 0.9))
    for i, (down, right) in enumerate(records):
        found.clear()
        seen = moved if base is None else x + moved
        logits = net(torch.roll(seen, (down, right), (2, 3)))
        loss = F.cross_entropy(logits, y) + r_bn * sum(v * (first if j == 0 else 1) for j, v in enumerate(found))
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / steps))
        adam.step()
        if base is None:
            moved.data = torch.maximum(torch.minimum(moved.data, literal.high), literal.low)
    return moved.detach()


def rolls(config, teacher, batch, count):
    """How far each iteration rolls, read off the record's effect on a single bright pixel."""
    side = teacher.shape[1]
    dot = torch.zeros(len(batch.labels), *teacher.shape)
    dot[:, :, 0, 0] = 1
    found = []
    for iteration in range(count):
        moved = multi_crop(dot, config.view(teacher, batch, iteration), side)
        assert all(torch.equal(moved[i], moved[0]) for i in range(len(moved)))  # one view for the whole batch
        at = int(moved[0, 0].argmax())
        found.append((at // side, at % side))
    return found


def bounded(teacher):
    literal.low, literal.high = teacher.bounds()


@pytest.mark.parametrize("method", [SRe2L, DWA])
def test_recovery_equals_the_published_loop(method, teacher, data, tmp_path):
    config = method(**SMALL, r_bn=0.3)
    bounded(teacher)
    made = make(config, [teacher], tmp_path, data)
    K = data.num_classes
    images = made.images.unflatten(0, (K, 2))
    real = real_images(config, data, [teacher]) if config.starts_real else None
    for batch in config.batches(K, 1):
        if real is None:
            start = torch.randn(
                len(batch.labels), *teacher.shape, generator=seeded_generator(0, Stream.NOISE_START, batch.number)
            )
        else:
            start = real[batch.labels, batch.place]
        records = rolls(config, teacher, batch, config.iterations)
        assert len(set(records)) > 1
        assert max(max(r) for r in records) <= config.jitter
        net = copy.deepcopy(teacher.net)
        if method is DWA:
            x = torch.roll(start, records[0], (2, 3))
            for _ in range(config.ascent_steps):
                grads = torch.autograd.grad(F.cross_entropy(net(x), batch.labels), list(net.parameters()))
                length = sum(g.square().sum() for g in grads).sqrt()
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.data += config.rho / config.ascent_steps * g / length
        wanted = literal(
            *(net, start, batch.labels, records, config.iterations),
            *(config.lr, config.r_bn, config.first, config.r_var),
        )
        torch.testing.assert_close(images[batch.labels, batch.place], wanted, rtol=1e-3, atol=1e-3)
        assert (wanted - start).abs().max() > 0.1


def test_infer_adds_one_compensator_to_all_classes(teacher, data, tmp_path):
    other = squeeze(replace(SQUEEZE, seed=1), data)
    K = data.num_classes
    config = INFER(ipc=2, iterations=5, jitter=1, r_bn=0.1)
    count, natural = config.per_class(K, 2)
    assert (count, natural) == (3 * int(2 / (2 / K + 1)), int(2 / (2 / K + 1)))
    made = make(config, [teacher, other], tmp_path, data)
    low, high = teacher.bounds()
    real = real_images(config, data, [teacher, other])
    images = made.images.unflatten(0, (K, count))
    assert torch.equal(images[:, :natural], real.clamp(low, high))
    for batch in config.batches(K, 2)[natural:]:
        start, net = real[batch.labels, batch.place % natural], (teacher, other)[batch.teacher].net
        records = rolls(config, teacher, batch, config.iterations)
        u = literal(
            *(net, start, batch.labels, records, 5, config.lr, 0.1, config.first, 1.0),
            base=torch.zeros(1, *teacher.shape),
        )
        assert u.abs().max() > 0.05
        torch.testing.assert_close(
            images[batch.labels, batch.place], (start + u).clamp(low, high), rtol=1e-3, atol=1e-3
        )
    assert {batch.teacher for batch in config.batches(K, 2)[natural:]} == {0, 1}


def test_real_starts_may_be_each_classs_centres(teacher, data):
    drawn, central = (real_images(DWA(ipc=2, start=start), data, [teacher]) for start in ("random", "kmeans"))
    assert drawn.shape == central.shape == (data.num_classes, 2, *teacher.shape)
    for label, images in enumerate(central):
        own = data.train_images[data.train_labels == label]
        assert (torch.cdist(images.flatten(1), own.flatten(1)).amin(1) == 0).all()
        with torch.no_grad():
            logits, spread = teacher.net(images), teacher.net(own)
        nearest = torch.cdist(spread, logits).amin(1).mean()
        pairs = torch.combinations(torch.arange(len(own)))
        assert nearest < torch.stack([torch.cdist(spread, spread[pair]).amin(1).mean() for pair in pairs]).median()


def test_cdas_crops_grow_smaller():
    config = CDA(iterations=100, crop=0.08)
    shares = [config.lowest_crop(i) for i in range(100)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[50] == pytest.approx(0.08 + 0.92 / 2)
    half = CDA(iterations=100, crop=0.2, milestone=0.5, schedule="linear")
    assert [half.lowest_crop(i) for i in (0, 25, 50, 99)] == pytest.approx([1, 0.6, 0.2, 0.2])
    step = CDA(iterations=10, milestone=0.3, schedule="step")
    assert [step.lowest_crop(i) for i in (0, 2, 3, 9)] == [1, 1, 0.08, 0.08]


def test_dwas_steps_accumulate_as_in_the_published_code(teacher, data):
    K = data.num_classes
    config = DWA(**(SMALL | {"batch_size": 1}))
    real = real_images(config, data, [teacher])
    batches = config.batches(K, 1)

    def starts(batch):
        return real[batch.labels, batch.place]

    def moved(config, batch):
        net = config.network(teacher, batch, starts)
        assert not any(p.requires_grad for p in net.parameters())
        return torch.cat([(p - q).flatten() for p, q in zip(net.parameters(), teacher.net.parameters(), strict=True)])

    piled = replace(config, accumulate=True)
    assert torch.equal(moved(piled, batches[0]), moved(config, batches[0]))
    alone, both = moved(config, batches[1]), moved(piled, batches[1])
    assert alone.norm() <= config.rho * 1.0001
    assert (both - alone).norm() > 0.3 * config.rho
    assert torch.equal(moved(piled, batches[K]), moved(config, batches[K]))  # the next image number starts afresh


@pytest.mark.parametrize(
    ("method", "precision"),
    [(SRe2L, "auto"), (CDA, "auto"), (DWA, "auto"), (INFER, "auto"), (SRe2L, "bf16"), (DWA, "bf16"), (INFER, "bf16")],
)
def test_shares_and_interruptions_change_no_bit(method, precision, teacher, data, tmp_path):
    config = method(**SMALL, precision=precision)
    whole = make(config, [teacher], tmp_path / "whole", data)
    real = real_images(config, data, [teacher]) if config.starts_real else None
    for rank in (1, 0):  # as two ranks would, and the second one in two pieces
        calls = []

        def stop(record, calls=calls):
            calls.append(record)
            if len(calls) == 2:
                raise KeyboardInterrupt

        options = {"real": real, "rank": rank, "world": 2, "checkpoint_every": 2}
        share = config.batches(data.num_classes, 1)[rank::2]
        with pytest.raises(KeyboardInterrupt) if any(batch.moves for batch in share) else nullcontext():
            recover(config, [teacher], tmp_path / "parts", on_step=stop, **options)
        recover(config, [teacher], tmp_path / "parts", **options)
    parts = merge(config, [teacher], tmp_path / "parts")
    assert torch.equal(parts.images, whole.images)
    assert torch.equal(parts.labels, whole.labels)
    assert not list((tmp_path / "parts").rglob("*.state"))


def test_random_images_are_the_real_ones(teacher, data, tmp_path):
    config = RandomImages(ipc=2)
    made = make(config, [teacher], tmp_path, data)
    low, high = teacher.bounds()
    assert torch.equal(made.images, real_images(config, data, [teacher]).flatten(0, 1).clamp(low, high))
    assert made.labels.tolist() == [c for c in range(data.num_classes) for _ in range(2)]


def test_recovery_refuses_what_does_not_fit(teacher, data, tmp_path):
    config = SRe2L(**SMALL)
    plain = Teacher(torch.nn.Flatten(), teacher.mean, teacher.std, teacher.class_names, teacher.config)
    with pytest.raises(ValueError, match="BatchNorm"):
        recover(config, [plain], tmp_path)
    rest = teacher.mean, teacher.std, teacher.class_names, teacher.config
    learning = Teacher(copy.deepcopy(teacher.net).train(), *rest)
    with pytest.raises(ValueError, match="training mode"):
        recover(config, [learning], tmp_path)
    fewer = Teacher(teacher.net, teacher.mean, teacher.std, teacher.class_names[:-1], teacher.config)
    with pytest.raises(ValueError, match=r"teachers: expected .* classes and images of .* as the first's, got"):
        recover(INFER(), [teacher, fewer], tmp_path, real=torch.zeros(1))
    with pytest.raises(ValueError, match="teachers: expected at least one, got none"):
        recover(config, [], tmp_path)
    with pytest.raises(ValueError, match=r"real: expected the images \[.*\] from which dwa starts, got none"):
        recover(DWA(**SMALL), [teacher], tmp_path)
    recover(config, [teacher], tmp_path, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"expected a file of this run; its lr differ"):
        merge(replace(config, lr=0.5), [teacher], tmp_path)
    part = tmp_path / "parts" / "00000.safetensors"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"00000.safetensors: expected .* truncated"):
        merge(config, [teacher], tmp_path)
    part.unlink()
    with pytest.raises(ValueError, match="expected the images of batch 0, found no file"):
        merge(config, [teacher], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 0}, "ipc: expected at least 1, got 0"),
        ({"crop": 1.5}, "crop: expected a share above 0 and at most 1, got 1.5"),
        ({"lr": math.nan}, "lr: expected a finite number of at least 0, got nan"),
    ],
)
def test_configurations_name_what_is_wrong(options, message):
    for method in DECOUPLED.values():
        with pytest.raises(ValueError, match=message):
            method(**options)


def test_infer_needs_a_real_image_in_the_budget():
    with pytest.raises(ValueError, match="ipc: expected enough for a real image of each class beside 4 teachers'"):
        INFER(ipc=1).per_class(10, 4)


def test_presets_are_the_published_scripts():
    assert (SRe2L.preset("imagenet-1k").lr, SRe2L.preset("imagenet-1k").r_bn) == (0.25, 0.01)
    assert SRe2L.preset("imagenet-1k").iterations == 4000
    assert SRe2L.preset("imagenet-1k").crop == 0.08
    dwa = DWA.preset("imagenet-1k")
    assert (dwa.r_var, dwa.ascent_steps, dwa.rho, dwa.iterations) == (2.0, 15, 0.015, 2000)
    assert (DWA.preset("cifar100").r_var, DWA.preset("cifar100").ascent_steps) == (11.0, 12)
    assert Relabel.preset("imagenet-1k").temperature == 20
    assert Relabel.preset("imagenet-1k").epochs == 300
    assert Relabel.preset("cifar100", "infer").static
    assert Relabel.preset("cifar100", "infer").mix == "mixup"


def test_resnets_are_squeezed_and_recovered_from(data, tmp_path):
    config = replace(SQUEEZE, network="resnet18", width=4, epochs=2)
    teacher = squeeze(config, data)
    images = make(SRe2L(ipc=1, iterations=4, jitter=1), [teacher], tmp_path, data).images
    x = torch.randn(3, 1, 6, 6, generator=seeded_generator(0, Stream.NOISE_START, 0))
    low, high = teacher.bounds()
    assert images.shape == x.shape
    assert (images - x.clamp(low, high)).abs().max() > 0.1
