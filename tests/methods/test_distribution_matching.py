"""DM, DataDAM, ATOM and FYI on top of them are their papers' loops, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.augment import DiffAugment
from pydistill.methods import ATOM, DM, FYIDM, FYIDSA, DataDAM, distill
from pydistill.methods.matching.datadam import PUBLISHED_CODE
from pydistill.methods.outer import fresh_parameters
from pydistill.nn import ConvNet
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule
from tests.bars import make_net

SHORT = {"ipc": 2, "iterations": 3, "batch_real": 6, "lr_img": 1.0, "augment": ""}
CONFIGS = {
    "dm": DM(**SHORT),
    "dm, augmented": DM(**SHORT | {"augment": "color_crop_scale"}),
    "dm, all real images": DM(**SHORT | {"batch_real": 100, "momentum": 0.0}, start="noise"),
    "datadam": DataDAM(**SHORT),
    "datadam, the last layer": DataDAM(**SHORT, last_layer=True, norm="l1", power=2.0),
    "datadam, as published": DataDAM(**SHORT | {"lr_img": 0.1}, power=1.0, net_norm="batch"),
    "atom": ATOM(**SHORT),
    "fyi_dm": FYIDM(**SHORT | {"augment": "scale"}),
}


def deep_net():
    """Of two blocks: the attention of all but the last is matched."""
    return ConvNet(1, 3, width=4, depth=2, image_size=6)


def plain_features(config, theta, x):
    """The activations and the embedding of the network that `deep_net` is, in plain torch."""
    found, parameters = [], FlatModule(deep_net()).unflatten(theta)
    weights = list(parameters.values())
    for block in range(2):
        filters, shift, scale, offset = weights[4 * block : 4 * block + 4]
        x = F.conv2d(x, filters, shift, padding=3 if block == 0 else 1)
        if getattr(config, "net_norm", "instance") == "batch":
            x = F.batch_norm(x, None, None, scale, offset, training=True)
        else:
            x = F.group_norm(x, x.shape[1], scale, offset)
        found.append(F.relu(x))
        x = F.avg_pool2d(found[-1], 2)
    return found, x.flatten(1)


def distances(config, theta, real, syn, classes):
    activations, embeddings = zip(*(plain_features(config, theta, x) for x in (real, syn)), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        total = total + (embeddings[0][classes[0] == k].mean(0) - embeddings[1][classes[1] == k].mean(0)).square().sum()
    if not isinstance(config, DataDAM):
        return total
    total = total * config.scale * config.task_balance
    for a, b in list(zip(*activations, strict=True))[: 2 if config.last_layer else 1]:
        for dims in (1, (2, 3))[: 2 if config.axis == "both" else 1]:
            maps = [f.pow(config.power).sum(dims).flatten(1) for f in (a, b)]
            maps = [F.normalize(m, p=2 if config.norm == "l2" else 1) for m in maps]
            for k in range(3):
                means = [m[y == k].mean(0) for m, y in zip(maps, classes, strict=True)]
                total = total + config.scale * (means[0] - means[1]).square().sum()
    return total


def literal(config, dataset):
    """The published loop in float64; only what is drawn comes from the method."""
    images = config.initial(dataset, deep_net(), None)["images"].double().requires_grad_()
    outer, losses = torch.optim.SGD([images], lr=config.lr_img, momentum=config.momentum), []
    augment = DiffAugment(config.augment)
    structure = deep_net()
    if getattr(config, "net_norm", "instance") == "batch":
        structure = ConvNet(1, 3, width=4, depth=2, image_size=6, norm="batch")
    for iteration in range(config.iterations):
        theta = fresh_parameters(structure, config.seed, Stream.OUTER_STEP_NET, iteration).double()
        reals, syns, classes = [], [], ([], [])
        for k in range(dataset.num_classes):
            generator = seeded_generator(config.seed, Stream.OUTER_STEP, iteration, k)
            members = (dataset.train_labels == k).nonzero()[:, 0]
            index = members[torch.randperm(len(members), generator=generator)[: config.batch_real]]
            real, syn = dataset.train_images[index].double(), images[2 * k : 2 * k + 2]
            if isinstance(config, FYIDM):
                syn = torch.cat([syn, syn.flip(3)])
            if config.augment:
                record = augment.draw((1, *real.shape[1:]), generator)
                real, syn = (augment(x, record.repeat(len(x), 1)) for x in (real, syn))
            for side, x, labels in zip((reals, syns), (real, syn), classes, strict=True):
                side.append(x)
                labels.append(torch.full((len(x),), k))
        loss = distances(config, theta, torch.cat(reals), torch.cat(syns), [torch.cat(y) for y in classes])
        outer.zero_grad()
        loss.backward(inputs=[images])
        outer.step()
        losses.append(loss.item() / dataset.num_classes)
    return images.detach(), losses


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_papers_loop(dataset, config):
    records = []
    start = config.initial(dataset, deep_net(), None)["images"]
    found = distill(config, dataset, deep_net(), on_step=lambda state, record: records.append(record)).images - start
    images, losses = literal(config, dataset)
    truth = images.float() - start
    assert truth.norm() > 1e-3 * start.norm()
    assert (found - truth).norm() < 1e-3 * truth.norm()
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-4)


def test_presets_are_the_papers():
    paper = DataDAM.preset("cifar10", 10)
    assert (paper.iterations, paper.batch_real, paper.power, paper.net_norm, paper.lr_img) == (
        *(8000, 128),
        *(4.0, "instance", 1.0),
    )
    assert PUBLISHED_CODE == {"power": 1.0, "net_norm": "batch", "batch_real": 64, "iterations": 20000}
    assert DataDAM(**PUBLISHED_CODE).power == 1.0
    assert (DM.preset("cifar10", 1).iterations, DM.preset("cifar10", 1).batch_real) == (20000, 256)
    assert "flip" not in DM.preset("digits", 1).augment


@pytest.mark.parametrize("method", [FYIDM, FYIDSA])
def test_flipped_images_are_augmented_as_their_originals_are_drawn(dataset, method):
    config = method(ipc=2, batch_real=3, augment="scale")
    images = config.initial(dataset, make_net(), None)["images"]
    pairs = config.pairs([0, 2], images, dataset, 1)
    assert pairs.labels_synthetic.tolist() == [0, 0, 2, 2, 0, 0, 2, 2]
    assert len(pairs.real) == 6
    assert len(pairs.synthetic) == 8
    torch.testing.assert_close(pairs.synthetic[:4].flip(3), pairs.synthetic[4:])  # scaling commutes with it
    assert config.augmentation().flip_batch


def test_wrong_options_are_named(dataset):
    for options, message in (
        ({"norm": "max"}, "norm: expected 'l2', 'l1' or 'none', got 'max'"),
        ({"net_norm": "layer"}, "net_norm: expected 'instance' or 'batch', got 'layer'"),
        ({"power": 0.0}, r"power: expected a number above zero, got 0\.0"),
        ({"start": "blank"}, "start: expected 'noise' or 'real', got 'blank'"),
        ({"batch_real": 0}, "batch_real: expected a finite number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DataDAM(**options)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ValueError, match="net_norm: expected 'instance' for a Sequential"):
        distill(DataDAM(net_norm="batch"), dataset, other)
