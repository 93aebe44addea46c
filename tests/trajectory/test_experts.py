"""Experts are those of torch's SGD, however their training was interrupted."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pydistill.nn import ConvNet
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory.experts import data_crc32, train_experts
from pydistill.trajectory.store import ExpertStore
from tests.bars import Shift, make_net


class Recorded:
    """Lets a test see the batches in their order."""

    def __init__(self):
        self.batches = []

    def draw(self, shape, generator):
        return None

    def __call__(self, images, record):
        self.batches.append(images.clone())
        return images


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.9, "schedule": "step"}, {"schedule": "cosine"}],
    ids=["plain", "momentum", "step", "cosine"],
)
def test_experts_are_those_of_one_optimizer(dataset, tmp_path, options):
    """Over all epochs; with the step schedule, of one for each half."""
    augment, path = Recorded(), tmp_path / "experts.store"
    arguments = (make_net, dataset.train_images, dataset.train_labels, path)
    fixed = {"num_experts": 1, "epochs": 4, "lr": 0.1, "batch_size": 20}
    (trajectory,) = train_experts(*arguments, **fixed, **options, augment=augment).tensor()
    net = make_net()
    vector_to_parameters(trajectory[0].clone(), net.parameters())
    sgd = {"momentum": options.get("momentum", 0.0), "weight_decay": options.get("weight_decay", 0.0)}
    by_image = {
        image.numpy().tobytes(): label for image, label in zip(dataset.train_images, dataset.train_labels, strict=True)
    }
    for epoch in range(4):
        if epoch == 0 or (epoch == 2 and options.get("schedule") == "step"):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1 if epoch == 0 else 0.01, **sgd)
        if options.get("schedule") == "cosine":
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2
        batches = augment.batches[3 * epoch : 3 * epoch + 3]
        assert [len(x) for x in batches] == [20, 20, 5]
        assert {image.numpy().tobytes() for x in batches for image in x} == by_image.keys()
        for x in batches:
            y = torch.stack([by_image[image.numpy().tobytes()] for image in x])
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(trajectory[epoch + 1], parameters_to_vector(net.parameters()).detach())


class CutOffError(Exception):
    pass


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_experts_cut_off_within_an_epoch_go_on_to_the_same_bytes(dataset, tmp_path, dtype, momentum):
    """Three experts that train at once, interrupted again and again in the second epoch after each start."""
    options = {"num_experts": 3, "epochs": 5, "lr": 0.05, "batch_size": 10, "seed": 3, "weight_decay": 1e-3}
    options |= {"dtype": dtype, "momentum": momentum}
    arguments = (make_net, dataset.train_images, dataset.train_labels)
    unbroken = train_experts(*arguments, tmp_path / "unbroken.store", **options)
    path, seen = tmp_path / "experts.store", []
    for _ in range(4):
        left = 3 * 5 + 4

        def on_step():
            nonlocal left
            left -= 1
            if left == 0:
                raise CutOffError

        with pytest.raises(CutOffError):
            train_experts(*arguments, path, **options, on_step=on_step)
        with ExpertStore(path) as store:
            seen.append(store.completed)
        torch.randn(7)
    assert seen == [[1] * 3, [2] * 3, [3] * 3, [4] * 3]
    records = []
    train_experts(*arguments, path, **options, on_epoch=records.append).close()
    assert [(record["expert"], record["epoch"]) for record in records] == [(0, 5), (1, 5), (2, 5)]
    assert path.read_bytes() == unbroken.path.read_bytes()


def test_bfloat16_rows_are_those_of_float32_training_rounded(dataset, tmp_path):
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "momentum": 0.9}
    arguments = (make_net, dataset.train_images, dataset.train_labels)
    wide = train_experts(*arguments, tmp_path / "wide.store", **options)
    half = train_experts(*arguments, tmp_path / "half.store", **options, dtype="bf16")
    assert torch.equal(half.tensor(), wide.tensor().bfloat16().float())


def test_experts_of_another_training_are_refused_and_kept(dataset, store):
    before = store.path.read_bytes()
    arguments = (make_net, dataset.train_images, dataset.train_labels, store.path)
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3}
    for changed, message in (
        ({"lr": 0.01}, r"expected experts trained with lr=0\.01, got 0\.05; overwrite=True"),
        ({"momentum": 0.5}, r"momentum=0\.5, got 0\.0"),
        ({"dtype": "bf16"}, "dtype='bf16', got 'fp32'"),
        ({"epochs": 4}, "epochs=4, got 3"),
        ({"weight_decay": 0.1}, r"weight_decay=0\.1, got None"),
        ({"schedule": "cosine"}, "schedule='cosine', got None"),
        ({"schedule": lambda epoch, epochs: 0.5}, r"schedule=\[0\.5, 0\.5, 0\.5\], got None"),
    ):
        with pytest.raises(ValueError, match=message):
            train_experts(*arguments, **{**options, **changed})
    with pytest.raises(ValueError, match="expected experts trained with data_crc32"):
        train_experts(make_net, dataset.train_images + 1, *arguments[2:], **options)
    with pytest.raises(
        ValueError, match=r"features\.0\.weight is \[5, 1, 3, 3\]; got features\.0\.weight \[4, 1, 3, 3\]"
    ):
        train_experts(lambda: ConvNet(1, 3, width=5, depth=1, image_size=6), *arguments[1:], **options)

    def zeros():
        net = make_net()
        nn.init.zeros_(net.classifier.bias)
        return net

    with pytest.raises(ValueError, match="expected experts that start as make_net's networks do"):
        train_experts(zeros, *arguments[1:], **options)
    assert store.path.read_bytes() == before


def test_overwrite_trains_anew(dataset, tmp_path):
    arguments = (make_net, dataset.train_images, dataset.train_labels, tmp_path / "experts.store")
    train_experts(*arguments, num_experts=2, epochs=2).close()
    found = train_experts(*arguments, num_experts=1, epochs=3, overwrite=True, dataset="bars")
    assert (found.shape[:2], found.completed, found.dataset) == ((1, 4), [3], "bars")
    assert found.data_crc32 == data_crc32(dataset.train_images, dataset.train_labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": -1.0}, ValueError, r"weight_decay: expected a finite number >= 0, got -1\.0"),
        ({"lr": 0.0}, ValueError, r"lr: expected a positive finite number, got 0\.0"),
        ({"nesterov": True}, TypeError, "unexpected keyword argument 'nesterov'"),
        (
            {"eval_data": torch.zeros(1)},
            TypeError,
            "eval_data: expected what JSON can hold, to be recorded, got Tensor",
        ),
        ({"dtype": "fp16"}, ValueError, "dtype: expected 'fp32' or 'bf16', got 'fp16'"),
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
    ],
)
def test_wrong_options_of_experts_leave_no_file(dataset, tmp_path, options, error, message):
    options = {"num_experts": 1, "epochs": 2, **options}
    with pytest.raises(error, match=message):
        train_experts(make_net, dataset.train_images, dataset.train_labels, tmp_path / "experts.store", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "experts.store").write_text("precious")
    with pytest.raises(error, match=message):
        train_experts(
            *(make_net, dataset.train_images, dataset.train_labels, tmp_path / "experts.store"),
            **options,
            overwrite=True,
        )
    assert (tmp_path / "experts.store").read_text() == "precious"


def test_experts_that_stand_at_different_epochs_are_continued(dataset, store, tmp_path):
    """As in a file whose experts trained one after the other."""
    experts, records, path = store.tensor(), [], tmp_path / "experts.store"
    header = {name: value for name, value in store.header.items() if name not in ("parameters", "architecture")}
    with ExpertStore.create(path, make_net(), **header) as partial:
        partial.append(range(2), 0, experts[:, 0])
        for epoch in (1, 2, 3):
            partial.append(range(1), epoch, experts[:1, epoch])
        partial.append(range(1, 2), 1, experts[1:, 1])
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3}
    arguments = (make_net, dataset.train_images, dataset.train_labels, path)
    found = train_experts(*arguments, **options, on_epoch=records.append).tensor()
    assert [(record["expert"], record["epoch"]) for record in records] == [(1, 2), (1, 3)]
    assert torch.equal(found[0], experts[0])
    torch.testing.assert_close(found[1], experts[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_experts_report_the_loss_and_accuracy_of_their_batches(dataset, tmp_path, together):
    def with_batch_norm():
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))

    make, records, steps = make_net if together else with_batch_norm, [], []
    options = {"num_experts": 2, "epochs": 2, "lr": 0.05, "batch_size": 10, "seed": 3, "augment": Shift()}
    found = train_experts(
        *(make, dataset.train_images, dataset.train_labels, tmp_path / "experts.store"),
        **options,
        on_epoch=records.append,
        on_step=lambda: steps.append(None),
    ).tensor()
    order = [(0, 1), (1, 1), (0, 2), (1, 2)] if together else [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [(record["expert"], record["epoch"]) for record in records] == order
    assert len(steps) == 2 * 2 * 5
    for record in records:
        expert, epoch = record["expert"], record["epoch"]
        net, generator = make(), seeded_generator(3, Stream.EXPERT_BATCHES, expert, epoch - 1)
        vector_to_parameters(found[expert, epoch - 1].clone(), net.parameters())
        total, right = 0.0, 0
        for index in torch.randperm(45, generator=generator).split(10):
            x, y = dataset.train_images[index], dataset.train_labels[index]
            logits = net(Shift()(x, Shift().draw(x.shape, generator)))
            loss = F.cross_entropy(logits, y)
            total += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
            for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                p.data -= 0.05 * g
        assert record["loss"] == pytest.approx(total / 45, rel=1e-4)
        assert record["accuracy"] == right / 45
        torch.testing.assert_close(found[expert, epoch], parameters_to_vector(net.parameters()).detach())


def test_an_expert_that_diverges_is_named(dataset, tmp_path):
    path = tmp_path / "experts.store"
    options = {"num_experts": 1, "epochs": 2, "lr": 1e30, "batch_size": 10}
    with pytest.raises(FloatingPointError, match=r"lr: .*got 1e\+30: the loss of expert 0 is nan in epoch 1, step \d"):
        train_experts(make_net, dataset.train_images, dataset.train_labels, path, **options)
    assert ExpertStore(path).completed == [0]
