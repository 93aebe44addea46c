"""SRe2L, CDA, DWA and INFER: recovery against literal loops, independent batches, labels, and what is refused."""

import copy
import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.augment import multi_crop
from pydistill.data import DistilledSet
from pydistill.labels import SoftLabelStore
from pydistill.methods import CDA, DECOUPLED, DWA, INFER, RandomImages, SRe2L
from pydistill.methods.decoupled.post_train import PostTrain, post_train
from pydistill.methods.decoupled.recover import merge, real_images, recover
from pydistill.methods.decoupled.relabel import Relabel, last_linear, relabel, replayed
from pydistill.methods.decoupled.squeeze import Squeeze, Teacher, build, import_weights, squeeze
from pydistill.nn import ConvNet, ResNet18
from pydistill.nn.description import from_description
from pydistill.seeding import Stream, seeded_generator
from tests.bars import make_dataset

SQUEEZE = Squeeze(network="convnet", width=6, depth=2, epochs=3, batch_size=10, lr=0.05, crop=0.8, flip=0.0)
SMALL = {"ipc": 2, "iterations": 6, "batch_size": 4, "jitter": 2}


@pytest.fixture(scope="module")
def data():
    return make_dataset()


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    return squeeze(SQUEEZE, data)


def make(config, teachers, folder, data, **options):
    real = real_images(config, data, teachers) if config.starts_real else None
    recover(config, teachers, folder, real=real, checkpoint_every=2, **options)
    return merge(config, teachers, folder)


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


@pytest.mark.parametrize("method", [SRe2L, CDA, DWA, INFER])
def test_shares_and_interruptions_change_no_bit(method, teacher, data, tmp_path):
    config = method(**SMALL)
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
        ({"crop": 1.5}, "crop: expected at most 1, got 1.5"),
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


def test_a_teacher_is_kept_and_read(teacher, data, tmp_path):
    teacher.save(tmp_path / "t.safetensors")
    again = Teacher.load(tmp_path / "t.safetensors")
    assert torch.equal(again.net(data.test_images), teacher.net(data.test_images))
    assert again.class_names == teacher.class_names
    assert again.config == teacher.config
    correct = (again.net(data.test_images).argmax(1) == data.test_labels).float().mean()
    assert correct > 0.9
    torch.save({"state_dict": {f"module.{k}": v for k, v in teacher.net.state_dict().items()}}, tmp_path / "w.pth")
    taken = import_weights(SQUEEZE, tmp_path / "w.pth", data)
    assert torch.equal(taken.net(data.test_images), teacher.net(data.test_images))
    with pytest.raises(ValueError, match=r"w.pth: expected the weights of a convnet; (?s:.*)size mismatch"):
        import_weights(replace(SQUEEZE, width=7), tmp_path / "w.pth", data)
    with pytest.raises(FileNotFoundError, match="expected the weights of a convnet, found no file"):
        import_weights(SQUEEZE, tmp_path / "none.pth", data)
    with pytest.raises(ValueError, match="network: expected one of convnet, resnet18, resnet50, got 'vgg'"):
        build("vgg", 1, 2, 8, 4, 2)


def test_squeezing_goes_on_bit_for_bit(data):
    kept = []
    whole = squeeze(SQUEEZE, data, on_epoch=lambda record, state: kept.append({k: v.clone() for k, v in state.items()}))
    rest = squeeze(SQUEEZE, data, state=kept[0])
    for (name, a), b in zip(whole.net.state_dict().items(), rest.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="state: expected one of this network"):
        squeeze(replace(SQUEEZE, width=7), data, state=kept[0])
    with pytest.raises(FloatingPointError, match=r"the loss of epoch 1 is nan: a smaller lr than 1e\+38 may help"):
        squeeze(replace(SQUEEZE, lr=1e38), data)


@pytest.fixture(scope="module")
def distilled(teacher, data, tmp_path_factory):
    return make(RandomImages(ipc=4), [teacher], tmp_path_factory.mktemp("random"), data)


VIEWS = Relabel(epochs=3, batch_size=5, crop=0.6)
STUDENT = PostTrain(network="convnet", width=6, depth=2)


def test_labels_are_the_teachers_mean_on_the_views_that_the_student_sees(teacher, data, distilled, tmp_path):
    other = squeeze(replace(SQUEEZE, seed=1), data)
    store = relabel(VIEWS, distilled, [teacher, other], tmp_path / "labels.store")
    side, seen, found = data.image_size, [], []
    student = post_train(STUDENT, distilled, VIEWS, store, num_classes=data.num_classes)
    assert not student.training
    for epoch in range(3):
        for index in store.batches(epoch):
            labels = store.read(epoch, index)
            x = replay(distilled.images, labels, side)
            with torch.no_grad():
                mean = (teacher.net(x) + other.net(x)) / 2
            z = torch.randn(len(index), data.num_classes, requires_grad=True)
            ours, wanted = (
                labels.loss(z),
                F.kl_div((z / 20).log_softmax(1), (mean.half().float() / 20).softmax(1), reduction="batchmean"),
            )
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6)
            seen.append(x)
            found.append(torch.tensor(index))
    assert [torch.cat(found[i : i + 3]).sort()[0].tolist() for i in (0, 3, 6)] == [list(range(12))] * 3
    assert not torch.equal(seen[0][:2], seen[3][:2])


@pytest.mark.parametrize("static", [False, True])
def test_features_are_stored_for_the_logits_that_they_make(teacher, data, distilled, tmp_path, static):
    """With two teachers, whose mean is one layer on the features of both."""
    other = squeeze(replace(SQUEEZE, seed=1), data)
    views = replace(VIEWS, epochs=1, format="fp32", **({"static": True, "mix": "mixup"} if static else {}))
    found = {
        format: relabel(replace(views, format=format), distilled, [teacher, other], tmp_path / format)
        for format in ("fp32", "features8")
    }
    weights = [next(m for m in net.modules() if isinstance(m, nn.Linear)).weight for net in (teacher.net, other.net)]
    assert torch.equal(found["features8"].classifier[0], torch.cat([w.detach() / 2 for w in weights], 1))
    for index in found["fp32"].batches(0):
        wanted, labels = (found[format].read(0, index) for format in ("fp32", "features8"))
        assert torch.equal(labels.records, wanted.records)
        span = labels.features.amax(1) - labels.features.amin(1)
        bound = float(span.max()) / 255 * float(found["features8"].classifier[0].abs().sum(1).max())
        torch.testing.assert_close(labels.dense, wanted.dense, rtol=0, atol=bound)
        assert not torch.equal(labels.dense, wanted.dense)
    post_train(STUDENT, distilled, replace(views, format="features8"), found["features8"], num_classes=data.num_classes)
    with pytest.raises(ValueError, match="features8: expected labels of these teachers, got those of others"):
        relabel(replace(views, format="features8"), distilled, [other, teacher], tmp_path / "features8")


def test_features_are_those_of_a_last_linear_layer():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, last = torch.randn(2, 4), nn.Linear(3, 2)
    assert last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), last), x) is last
    for wrong in (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), nn.Sequential(nn.Flatten()), Scaled(4, 2)):
        with pytest.raises(
            ValueError, match=r"teachers: expected networks that end in an nn\.Linear for 'features8', got"
        ):
            last_linear(wrong, x)


def test_static_labels_are_mixed_as_the_images_are(teacher, data, distilled, tmp_path):
    views = replace(VIEWS, static=True, mix="mixup", alpha=0.8, crop=1.0, flip=0.0)
    store = relabel(views, distilled, [teacher], tmp_path / "labels.store")
    with torch.no_grad():
        whole = teacher.net(distilled.images)
    mixes = 0
    for index in store.batches(0):
        labels = store.read(0, index)
        x = replay(distilled.images, labels, data.image_size)
        # the share with which an image of itself and its partner are mixed, found from the view alone
        given = labels.dense.float()
        for i, row in enumerate(index):
            best = min(
                (
                    float((x[i] - lam * distilled.images[row] - (1 - lam) * distilled.images[partner]).abs().max()),
                    k,
                    lam,
                )
                for k, partner in enumerate(index)
                for lam in [share(x[i], distilled.images[row], distilled.images[partner])]
            )
            assert best[0] < 1e-4
            wanted = best[2] * whole[row] + (1 - best[2]) * whole[index[best[1]]]
            torch.testing.assert_close(given[i], wanted, rtol=5e-3, atol=5e-3)
            mixes += 0.01 < best[2] < 0.99
    assert mixes > 3
    with pytest.raises(ValueError, match="static: expected mix='mixup' or 'none'"):
        Relabel(static=True)


def share(x, a, b):
    """lam of the least squares fit x = lam a + (1 - lam) b."""
    d = a - b
    return float(((x - b) * d).sum() / d.square().sum().clamp_min(1e-12)) if d.abs().max() > 0 else 1.0


def test_relabelling_goes_on_where_the_store_ends_and_post_training_where_it_stopped(
    teacher, data, distilled, tmp_path
):
    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel(VIEWS, distilled, [teacher], tmp_path / "cut", on_epoch=stop)
    with pytest.raises(ValueError, match=r"cut: expected all of 3 epochs, 2 lack labels \(1, 2\)"):
        post_train(STUDENT, distilled, VIEWS, SoftLabelStore.open(tmp_path / "cut"), num_classes=3)
    cut = relabel(VIEWS, distilled, [teacher], tmp_path / "cut")
    whole = relabel(VIEWS, distilled, [teacher], tmp_path / "whole")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [cut.batches(epoch) for epoch in range(3)] == [whole.batches(epoch) for epoch in range(3)]
    for rank in (1, 0):
        relabel(VIEWS, distilled, [teacher], tmp_path / f"rank{rank}", rank=rank, world=2)
    SoftLabelStore.merge([tmp_path / "rank0", tmp_path / "rank1"], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()

    for store in (whole, None):
        kept = []
        options = {"num_classes": data.num_classes}
        once = post_train(
            *(STUDENT, distilled, VIEWS, store),
            on_epoch=lambda record, state, kept=kept: kept.append({k: v.clone() for k, v in state.items()}),
            **options,
        )
        again = post_train(STUDENT, distilled, VIEWS, store, state=kept[1], **options)
        for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_students_learn_from_soft_and_from_hard_labels(teacher, data, distilled, tmp_path):
    views = replace(VIEWS, epochs=60, batch_size=6)
    store = relabel(views, distilled, [teacher], tmp_path / "labels.store")
    student = replace(STUDENT, lr=0.01)
    for labels in (store, None):
        net = post_train(student, distilled, views, labels, num_classes=data.num_classes)
        assert (net(data.test_images).argmax(1) == data.test_labels).float().mean() > 0.8


def test_relabelling_refuses_what_does_not_fit(teacher, data, distilled, tmp_path):
    fewer = Teacher(teacher.net, teacher.mean, teacher.std, teacher.class_names[:-1], teacher.config)
    with pytest.raises(ValueError, match="teachers: expected 3 classes as the images have, got 2"):
        relabel(VIEWS, distilled, [fewer], tmp_path / "a")
    larger = Teacher(teacher.net, teacher.mean, teacher.std, teacher.class_names, {**teacher.config, "image_size": 9})
    with pytest.raises(ValueError, match=r"teachers: expected images of \[1, 6, 6\], got \[1, 9, 9\]"):
        relabel(VIEWS, distilled, [larger], tmp_path / "a")
    store = relabel(VIEWS, distilled, [teacher], tmp_path / "a")
    moved = DistilledSet(distilled.images + 1, distilled.labels, 0.01, distilled.mean, distilled.std, distilled.config)
    with pytest.raises(ValueError, match="expected labels of these images, got those of others"):
        relabel(VIEWS, moved, [teacher], tmp_path / "a")
    net = copy.deepcopy(teacher.net)
    next(net.parameters()).data.mul_(1.01)
    other = Teacher(net, teacher.mean, teacher.std, teacher.class_names, teacher.config)
    with pytest.raises(ValueError, match="a: expected labels of these teachers, got those of others"):
        relabel(VIEWS, distilled, [other], tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected labels of .*, got some of crop=0.6"):
        relabel(replace(VIEWS, crop=0.7), distilled, [teacher], tmp_path / "a")
    with pytest.raises(ValueError, match="store: expected labels of 4 classes, got 3"):
        post_train(STUDENT, distilled, VIEWS, store, num_classes=4)
    with pytest.raises(ValueError, match="labels: expected hard labels of 2 classes where there is no store"):
        post_train(STUDENT, distilled, VIEWS, None, num_classes=2)


def replay(images, labels, side):
    return multi_crop(images, replayed(labels), side)


def test_imagenets_weights_need_no_images(tmp_path):
    torch.save(ResNet18().state_dict(), tmp_path / "resnet18.pth")
    teacher = import_weights(Squeeze.preset("imagenet-1k"), tmp_path / "resnet18.pth")
    assert teacher.shape == (3, 224, 224)
    assert teacher.num_classes == 1000
    low, high = (bound.flatten().tolist() for bound in teacher.bounds())
    assert low == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-3)
    assert high == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Squeeze(crop=0), "crop: expected a share above 0 and at most 1, got 0"),
        (lambda: Squeeze(flip=2), "flip: expected a probability, got 2"),
        (lambda: Squeeze(epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: Relabel(batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda: Relabel(temperature=0), "temperature: expected a positive finite number, got 0"),
        (lambda: Relabel(flip=-1), "flip: expected a probability, got -1"),
        (lambda: Relabel(mix="cut"), "mix: expected 'cutmix', 'mixup' or 'none', got 'cut'"),
        (lambda: Relabel(static="no"), "static: expected True or False, got 'no'"),
    ],
)
def test_steps_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_resnets_are_squeezed_and_recovered_from(data, tmp_path):
    config = replace(SQUEEZE, network="resnet18", width=4, epochs=2)
    teacher = squeeze(config, data)
    images = make(SRe2L(ipc=1, iterations=4, jitter=1), [teacher], tmp_path, data).images
    x = torch.randn(3, 1, 6, 6, generator=seeded_generator(0, Stream.NOISE_START, 0))
    low, high = teacher.bounds()
    assert images.shape == x.shape
    assert (images - x.clamp(low, high)).abs().max() > 0.1


class Branches(nn.Module):
    """A user's own network, not made of plain layers only."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.left(x.flatten(1)) * self.right(x.flatten(1))


def plain():
    blocks = OrderedDict(norm=nn.GroupNorm(2, 8, affine=False), act=nn.LeakyReLU(0.2), pool=nn.MaxPool2d((1, 2)))
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8, momentum=0.2), nn.ReLU(inplace=True)),
        *(nn.Sequential(blocks), nn.Conv2d(8, 8, (2, 1), groups=2), nn.LayerNorm([8, 1, 1], bias=False)),
        *(nn.AvgPool2d(1, count_include_pad=False), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 3)),
    )


def kept(net, path, **options):
    images = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    config = {"channels": 3, "image_size": 2, "dataset": "mine"}
    teacher = Teacher(net.eval(), torch.zeros(3), torch.ones(3), ("a", "b", "c"), config)
    teacher.save(path, **options)
    return images, teacher.net(images)


def test_a_teacher_of_plain_layers_needs_no_more_than_its_file(tmp_path):
    net = plain()
    net[1].running_var.uniform_(0.5, 2)
    images, logits = kept(net, tmp_path / "t.safetensors")
    read = Teacher.load(tmp_path / "t.safetensors")
    assert torch.equal(read.net(images), logits)
    assert repr(read.net) == repr(net)
    assert all(p.requires_grad for p in read.net.parameters())
    assert (read.num_classes, read.shape) == (3, (3, 2, 2))


def test_a_teacher_of_ones_own_network_is_read_into_it(tmp_path):
    path, net = tmp_path / "t.safetensors", Branches()
    images, logits = kept(net, path, network="collections:OrderedDict")
    wanted = (
        r"t\.safetensors: network: expected .*: a Branches, by its maker's note 'collections:OrderedDict'; got None"
    )
    with pytest.raises(ValueError, match=wanted):
        Teacher.load(path)
    for network in (Branches(), Branches, f"{__name__}:Branches"):
        read = Teacher.load(path, network=network)
        assert torch.equal(read.net(images), logits)
        assert not read.net.training
    with pytest.raises(TypeError, match="network: expected a module or a function that makes one, got OrderedDict"):
        Teacher.load(path, network="collections:OrderedDict")
    for wrong in ("collections", "collections:Absent", "no.such.module:make"):
        with pytest.raises(ValueError, match=r"network: expected 'package\.module:function', got"):
            Teacher.load(path, network=wrong)
    with pytest.raises(ValueError, match=r"t\.safetensors: expected a whole teacher (?s:.*)Missing key"):
        Teacher.load(path, network=plain)


@pytest.mark.parametrize("change", ["hook", "forward", "subclass", "option"])
def test_what_only_looks_like_plain_layers_is_not_read_as_such(tmp_path, change):
    """Nor is a network named by the configuration, but with another activation, read as that one."""
    path, net = tmp_path / "t.safetensors", plain()
    if change == "hook":
        net[2].register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == "forward":
        net[2].forward = torch.tanh
    elif change == "subclass":
        net[2] = type("ReLU", (nn.ReLU,), {"forward": lambda self, x: x})()
    else:
        net = ConvNet(3, 3, 4, 1, 2, norm="batch", act="leakyrelu")
    config = {"channels": 3, "image_size": 2, "dataset": "mine", "network": "convnet", "width": 4, "depth": 1}
    Teacher(net.eval(), torch.zeros(3), torch.ones(3), ("a", "b", "c"), config).save(path)
    with pytest.raises(ValueError, match="network: expected the module that its weights are of"):
        Teacher.load(path)
    assert Teacher.load(path, network=net).net is net


@pytest.mark.parametrize(
    "description",
    [
        {"layer": "Linear"},
        {"layer": "Linear", "options": {"in_features": -1, "out_features": 2}},
        {"layer": "Linear", "options": {"in_features": 1, "out_features": 2, "device": "cpu"}},
        {"layer": "Transformer", "options": {}},
        {"sequential": {"a.b": {"layer": "ReLU", "options": {}}}},
        {"sequential": [1]},
        ["Linear"],
        "os:system",
    ],
)
def test_a_description_of_something_else_is_refused(description):
    with pytest.raises(ValueError, match="description: expected layers of torch and their options, got others"):
        from_description(description)
