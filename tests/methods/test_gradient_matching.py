"""DC and DSA are their code's loops, written out."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from pydistill.augment import DiffAugment
from pydistill.methods import DC, DSA, distill
from pydistill.methods.outer import fresh_parameters
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule
from tests.bars import make_net

SHORT = {"ipc": 2, "iterations": 2, "outer_loop": 3, "inner_loop": 2, "batch_real": 6, "lr_img": 1.0, "lr_net": 0.05}
CONFIGS = {
    "dc": DC(**SHORT, seed=4),
    "dc, all real images": DC(**SHORT | {"batch_real": 100, "momentum": 0.0}),
    "dsa": DSA(**SHORT, augment="color_crop_scale"),
    "mse": DC(**SHORT | {"lr_img": 10.0}, distance="mse", start="real"),
}


def run(config, dataset, **options):
    return distill(config, dataset, make_net(), **options)


def literal_match(real, syn, kind):
    if kind == "mse":
        return sum((r - s).square().sum() for r, s in zip(real, syn, strict=True))
    total = 0
    for r, s in zip(real, syn, strict=True):
        if r.dim() > 1:
            r, s = r.flatten(1), s.flatten(1)
            total = total + (1 - (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + 1e-6)).sum()
    return total


def literal(config, dataset):
    """The published loop in float64, on torch's modules and optimizers; only what is drawn comes from the method."""
    start = config.initial(dataset, make_net(), None)
    images, labels = start["images"].double().requires_grad_(), start["labels"]
    outer, losses = torch.optim.SGD([images], lr=config.lr_img, momentum=config.momentum), []
    augment = DiffAugment(config.augment) if config.augment else None
    for iteration in range(config.iterations):
        net, total = make_net().double(), 0.0
        theta = fresh_parameters(make_net(), config.seed, Stream.OUTER_STEP_NET, iteration).double()
        torch.nn.utils.vector_to_parameters(theta, net.parameters())
        parameters = list(net.parameters())
        inner = torch.optim.SGD(parameters, lr=config.lr_net, momentum=config.momentum)
        for turn in range(config.outer_loop):
            loss = 0
            for k in range(dataset.num_classes):
                generator = seeded_generator(config.seed, Stream.OUTER_STEP, iteration, turn, k)
                members = (dataset.train_labels == k).nonzero()[:, 0]
                index = members[torch.randperm(len(members), generator=generator)[: config.batch_real]]
                real, syn = dataset.train_images[index].double(), images[labels == k]
                if augment is not None:
                    record = augment.draw((1, *real.shape[1:]), generator)
                    real, syn = (augment(x, record.repeat(len(x), 1)) for x in (real, syn))
                real_grads, syn_grads = (
                    torch.autograd.grad(
                        F.cross_entropy(net(x), torch.full((len(x),), k)), parameters, create_graph=True
                    )
                    for x in (real, syn)
                )
                loss = loss + literal_match([g.detach() for g in real_grads], syn_grads, config.distance)
            outer.zero_grad()
            loss.backward(inputs=[images])
            outer.step()
            total += loss.item()
            if turn == config.outer_loop - 1:
                break
            generator = seeded_generator(config.seed, Stream.INNER_TRAINING, iteration, turn)
            for _ in range(config.inner_loop):
                index = torch.randperm(len(images), generator=generator)
                x = images.detach()[index]
                if augment is not None:
                    x = augment(x, augment.draw(x.shape, generator))
                inner.zero_grad()
                F.cross_entropy(net(x), labels[index]).backward()
                inner.step()
        losses.append(total / dataset.num_classes / config.outer_loop)
    return images.detach(), losses


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_papers_loop(dataset, config):
    records = []
    start = config.initial(dataset, make_net(), None)["images"]
    found = run(config, dataset, on_step=lambda state, record: records.append(record)).images - start
    images, losses = literal(config, dataset)
    truth = images.float() - start
    assert truth.norm() > 0.02 * start.norm()
    assert (found - truth).norm() < 1e-3 * truth.norm()
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-4)
    assert all(record["grad_norm"] > 0 for record in records)


def test_dsa_augments_both_sides_alike(dataset):
    """One draw per class: equal real and synthetic images stay equal, and so do their gradients."""
    config = DSA(ipc=15, batch_real=15, outer_loop=1, iterations=1)
    state = config.initial(dataset, make_net(), None)
    for turn in range(4):
        real, syn, *_ = config.pairs([1], state["images"], dataset, 0, turn)
        assert sorted(x.sum().item() for x in real) == pytest.approx(sorted(x.sum().item() for x in syn), abs=1e-4)
        assert not torch.equal(syn, state["images"][15:30])
    records = []
    run(replace(config, augment="scale"), dataset, on_step=lambda state, record: records.append(record))
    assert abs(records[0]["loss"]) < 1e-3  # all real images of a class are its synthetic ones


def test_where_images_start(dataset):
    real = {image.numpy().tobytes() for image in dataset.train_images}
    for config, expected in ((DC(ipc=2), False), (DC(ipc=2, start="real"), True), (DSA(ipc=2), True)):
        state = config.initial(dataset, make_net(), None)
        assert all((image.numpy().tobytes() in real) == expected for image in state["images"])
        assert state["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        assert state["lr"].item() == pytest.approx(0.01)


def test_presets_are_the_papers():
    assert (DC.preset("cifar10", 10).outer_loop, DC.preset("cifar10", 10).inner_loop) == (10, 50)
    assert (DSA.preset("cifar100", 50).outer_loop, DSA.preset("cifar100", 50).inner_loop) == (50, 10)
    paper = DSA.preset("cifar10", 1)
    assert (paper.iterations, paper.batch_real, paper.lr_img, paper.momentum, paper.lr_net) == (
        1000,
        256,
        0.1,
        0.5,
        0.01,
    )
    assert (paper.augment, paper.start) == ("color_crop_cutout_flip_scale_rotate", "real")
    assert (DC.preset("cifar10", 1).augment, DC.preset("cifar10", 1).start) == ("", "noise")
    assert "flip" not in DSA.preset("digits", 1).augment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_loop": 0}, "outer_loop: expected a finite number of at least 1, got 0"),
        ({"batch_real": 0}, "batch_real: expected a finite number of at least 1, got 0"),
        ({"lr_img": -1.0}, r"lr_img: expected a finite number of at least 0, got -1\.0"),
        ({"start": "blank"}, "start: expected 'noise' or 'real', got 'blank'"),
        ({"distance": "l1"}, "distance: expected 'row_cos', 'cos' or 'mse', got 'l1'"),
        ({"augment": "flip_melt"}, "augment: expected names out of color, .*, got 'melt' in 'flip_melt'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DSA(**options)


def test_other_nets_go_through_autograd(dataset):
    """A net that the student engine does not run: the same loop, the same result as in float64."""
    config = replace(CONFIGS["dc"], iterations=1, outer_loop=1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    start = config.initial(dataset, net, None)["images"]
    moved = distill(config, dataset, net).images - start
    wide = FlatModule(net)
    theta = fresh_parameters(net, config.seed, Stream.OUTER_STEP_NET, 0).requires_grad_()
    images, loss = start.clone().requires_grad_(), 0
    for k in range(3):
        real, syn, *_ = config.pairs([k], images, dataset, 0, 0)
        grads = [
            torch.autograd.grad(F.cross_entropy(wide(theta, x), torch.full((len(x),), k)), theta, create_graph=True)[0]
            for x in (real, syn)
        ]
        parts = [wide.unflatten(g) for g in grads]
        loss = loss + literal_match(list(parts[0].values()), list(parts[1].values()), "row_cos")
    (grad,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(moved, -config.lr_img * grad, rtol=1e-4, atol=1e-6)


def test_a_saved_configuration_is_the_same_one():
    for config in CONFIGS.values():
        assert type(config)(**asdict(config)) == config
