"""DQ and PCA: where their images come from, what the options change, and the command line."""

import json
from dataclasses import replace

import pytest
import torch

from pydistill.cli import main
from pydistill.data import DistilledSet, load
from pydistill.evaluate import accuracy
from pydistill.methods import DQ, PCA, combine, quantize
from pydistill.methods.selection.dq import class_bins
from pydistill.methods.selection.picking import train_teacher
from pydistill.nn import ConvNet
from pydistill.select import sample_scores

SMALL = ["--width", "8", "--teacher-epochs", "3", "--ipc", "4", "--students", "2", "--student-epochs", "20"]


@pytest.fixture(scope="module")
def dataset():
    return load("digits")


@pytest.fixture(scope="module")
def teacher(dataset):
    config = replace(DQ.preset("digits"), teacher_epochs=3)
    return train_teacher(config, dataset, lambda: ConvNet(1, 10, 8, 3, 16))


def place_of(images, dataset):
    """The index of each image among the training images, which it equals to the bit."""
    same = (images.flatten(1)[:, None] == dataset.train_images.flatten(1)).all(2)
    assert same.any(1).all()
    return same.to(torch.uint8).argmax(1)


def test_the_teacher_has_learnt_and_is_the_seeds(dataset, teacher):
    assert accuracy(teacher, dataset.test_images, dataset.test_labels) > 0.85
    assert not teacher.training
    short = replace(dataset, train_images=dataset.train_images[:128], train_labels=dataset.train_labels[:128])
    nets = [
        train_teacher(DQ(teacher_epochs=1, seed=seed), short, lambda: ConvNet(1, 10, 8, 3, 16)) for seed in (0, 0, 1)
    ]
    weights = [net.classifier.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dq_draws_evenly_from_the_bins(dataset, teacher):
    config = DQ(ipc=7, bins=3)
    found = quantize(config, dataset, teacher, lr=0.02)
    assert found.lr == 0.02
    assert found.labels.tolist() == [label for label in range(10) for _ in range(7)]
    index = place_of(found.images, dataset)
    for label in range(10):
        members = (dataset.train_labels == label).nonzero()[:, 0]
        bins = class_bins(config, dataset, teacher, members)
        assert bins.shape == (3, len(members) // 3)
        own = index[7 * label : 7 * label + 7]
        assert len(own.unique()) == 7
        assert [int(torch.isin(own, members[row]).sum()) for row in bins] == [3, 2, 2]
    again = quantize(config, dataset, teacher, lr=0.02)
    assert torch.equal(again.images, found.images)
    assert not torch.equal(quantize(replace(config, seed=1), dataset, teacher).images, found.images)
    assert not torch.equal(quantize(replace(config, gradients=False), dataset, teacher).images, found.images)


def test_dq_bin_of_the_budget_is_the_greedy_choice(dataset, teacher):
    config = DQ(ipc=5, bins=1, bin_size=5)
    found = [quantize(replace(config, seed=seed), dataset, teacher) for seed in (0, 1)]
    sets = [set(place_of(each.images, dataset).tolist()) for each in found]
    assert sets[0] == sets[1]  # only their order is drawn


def test_dq_drops_patches(dataset, teacher):
    whole = quantize(DQ(ipc=2), dataset, teacher)
    part = quantize(DQ(ipc=2, keep=0.75), dataset, teacher)
    patches = (whole.images - part.images).view(20, 4, 4, 4, 4).abs().amax((2, 4))  # [20, 4, 4]
    dropped = (patches > 0).sum((1, 2))
    assert dropped.max() == 4
    assert (dropped <= 4).all()


def test_pca_is_prune_crop_and_mosaic(dataset, teacher):
    config = PCA(ipc=3, factor=2, prune=0.1, crops=2, least_area=0.7)
    found = combine(config, dataset, teacher)
    assert found.images.shape == (30, 1, 16, 16)
    assert found.labels.tolist() == [label for label in range(10) for _ in range(3)]
    whole = replace(config, factor=1, crops=1, least_area=1.0, prune=0.01, ipc=4)
    images = combine(whole, dataset, teacher).images
    for label in range(10):
        members = (dataset.train_labels == label).nonzero()[:, 0]
        with torch.no_grad():
            found = sample_scores(teacher(dataset.train_images[members]), dataset.train_labels[members], ["el2n"])[
                "el2n"
            ]
        easiest = dataset.train_images[members[found.argsort()[:4]]]
        distance = torch.cdist(images[4 * label : 4 * label + 4].flatten(1), easiest.flatten(1))
        assert (distance.amin(0) < 1e-4).all()  # bilinear sampling at the pixels' centres


def test_pca_takes_the_hard_or_labels_softly(dataset, teacher):
    config = PCA(ipc=3, prune=0.05)

    def loss(config):
        found = combine(config, dataset, teacher)
        return found, torch.nn.functional.cross_entropy(teacher(found.images), torch.arange(10).repeat_interleave(3))

    easy, least = loss(config)
    _, most = loss(replace(config, hard=True))
    assert most > least
    soft, _ = loss(replace(config, soft_labels=True))
    assert soft.label_kind == "logits"
    assert torch.equal(soft.images, easy.images)
    with torch.no_grad():
        torch.testing.assert_close(soft.labels, teacher(soft.images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, t: DQ(bins=0), "bins: expected at least 1, got 0"),
        (lambda d, t: DQ(keep=0.0), r"keep: expected a share in \(0, 1\], got 0.0"),
        (lambda d, t: PCA(prune=1.5), r"prune: expected a share in \(0, 1\], got 1.5"),
        (lambda d, t: PCA(teacher_lr=-1), "teacher_lr: expected a positive finite number, got -1"),
        (lambda d, t: PCA(augment="blur"), "blur"),
        (lambda d, t: quantize(DQ(ipc=1000), d, t), "ipc, bins . bin_size: expected at most 1.., .* got 1000"),
        (lambda d, t: quantize(DQ(ipc=5, bins=2, bin_size=2), d, t), "ipc: expected at most 4, the images in the bins"),
        (lambda d, t: combine(PCA(ipc=100, factor=2), d, t), r"ipc \* factor\^2: expected at most 1.., .* got 400"),
        (lambda d, t: combine(PCA(ipc=1, factor=3), d, t), "factor: expected a divisor of 16 and 16, got 3"),
        (
            lambda d, t: train_teacher(DQ(), d, lambda: torch.nn.Linear(2, 2)),
            "make_net: expected a network of pydistill",
        ),
    ],
)
def test_bad_input_is_named(call, message, dataset, teacher):
    with pytest.raises(ValueError, match=message):
        call(dataset, teacher)


@pytest.mark.parametrize("method", ["dq", "pca"])
def test_the_command_writes_a_set_that_evaluate_reads(method, tmp_path, capsys):
    folder = tmp_path / "run"
    main(["select", method, "--out", str(folder), *SMALL])
    assert f"picked ({method})" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    found = DistilledSet.load(folder / "distilled.safetensors")
    assert len(found.images) == results["picked"]["images"] == 40
    assert found.config["method"] == method
    assert len(results["random"]["accuracies"]) == 2
    assert (folder / "images.png").read_bytes()[:4] == b"\x89PNG"
    report = tmp_path / "report.json"
    main(["evaluate", str(folder / "distilled.safetensors"), "--students", "2", "--json", str(report)])
    (evaluated,) = json.loads(report.read_text())["nets"].values()
    assert evaluated["accuracies"] == pytest.approx(results["picked"]["accuracies"], abs=0.02)
    again = tmp_path / "again"
    main(["select", method, "--out", str(again), *SMALL, "--students", "0"])
    assert (again / "distilled.safetensors").read_bytes() == (folder / "distilled.safetensors").read_bytes()
    assert "random" not in json.loads((again / "results.json").read_text())
    with pytest.raises(SystemExit) as refused:
        main(["select", method, "--out", str(folder), *SMALL])
    assert refused.value.code == 2
    assert "--out: expected a new or empty folder" in capsys.readouterr().err


def test_a_stopped_command_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    from pydistill.cli.console import Stop

    monkeypatch.setattr(Stop, "requested", True)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["select", "dq", "--out", str(folder), *SMALL])
    assert stopped.value.code == 130
    assert "stopped; the same command starts anew" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dq", "--dataset", "cifar"], "--dataset: expected one of digits"),
        (["dq", "--ipc", "500"], "ipc: expected at most"),
        (["pca", "--students", "-1"], "--students: expected at least 0, got -1"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["select", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
