"""``pydistill evaluate`` and ``export``, and what the sets of every method are worth."""

import json
import os
import struct
import typing
from typing import get_args

import pytest
import torch

from pydistill.cli import main
from pydistill.cli.evaluate import NetName
from pydistill.data import DATASETS, REPOSITORY_NORMALISATION, DistilledSet, load, renormalise
from pydistill.evaluate import evaluate
from pydistill.methods import METHODS, Config
from pydistill.methods.method import DatasetName
from pydistill.methods.settings import SETTINGS
from pydistill.nn import NETS, make
from pydistill.whitening import ZCA
from tests.integration.commands import records, refused, run
from tests.matrices import sample


def evaluated(tmp_path, *arguments):
    """The JSON that ``pydistill evaluate`` writes."""
    main(["evaluate", *map(str, arguments), "--json", str(tmp_path / "found.json")])
    return json.loads((tmp_path / "found.json").read_text())


def test_evaluate_gives_the_accuracies_of_the_run_again(finished, tmp_path):
    folder, _ = finished
    code, output = run("evaluate", folder / "distilled.safetensors", "--students", 2, "--json", tmp_path / "found.json")
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    of_the_run = records(folder, "evaluate")[1]
    assert found["nets"]["convnet-D2-W4"]["accuracies"] == of_the_run["accuracies"]
    assert (found["lr"], found["epochs"], found["images"]) == (of_the_run["lr"], 5, 10)
    assert f"{100 * sum(of_the_run['accuracies']) / 2:.1f} ±" in output


def test_evaluate_makes_a_row_for_each_architecture(finished, tmp_path, capsys):
    file = finished[0] / "distilled.safetensors"
    options = ("--students", 2, "--epochs", 2, "--seed", 3, "--batch-size", 4, "--lr", 0.05)
    found = evaluated(tmp_path, file, "--net", "convnet", "mlp", "alexnet", *options, "--width", 5, "--depth", 1)
    rows = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    for row, (name, result) in zip(rows, found["nets"].items(), strict=True):
        assert row.startswith(f"│ {name} ")
        assert f"{100 * result['mean']:.1f} ± {100 * result['std']:.1f} %" in row
    assert list(found["nets"]) == ["convnet-D1-W5", "mlp", "alexnet"]
    assert {name: found[name] for name in ("dataset", "label_kind", "lr", "epochs", "batch_size", "seed")} == {
        "dataset": "digits",
        "label_kind": "hard",
        "lr": 0.05,
        "epochs": 2,
        "batch_size": 4,
        "seed": 3,
    }
    distilled, digits = DistilledSet.load(file), load("digits", image_size=8)
    data = distilled.images, distilled.labels, digits.test_images, digits.test_labels
    mlp = evaluate(lambda: make("mlp", 1, 10, 8), *data, lr=0.05, epochs=2, batch_size=4, students=range(2), seed=3)
    assert found["nets"]["mlp"]["accuracies"] == mlp


def test_evaluate_takes_soft_labels_in_a_space_of_their_own(finished, tmp_path):
    """Logits equivalent to the hard labels, in another normalisation, to which the test images are converted."""
    hard = DistilledSet.load(finished[0] / "distilled.safetensors")
    mean, std = hard.mean + 0.2, hard.std * 0.5
    soft = DistilledSet(
        renormalise(hard.images, (hard.mean, hard.std), (mean, std)),
        30 * torch.nn.functional.one_hot(hard.labels, 10).float(),
        hard.lr,
        mean,
        std,
        {"dataset": "digits"},
        "logits",
    )
    soft.save(tmp_path / "soft.safetensors")
    options = ("--students", 2, "--epochs", 100, "--lr", 0.05, "--width", 8, "--depth", 2)
    found = evaluated(tmp_path, tmp_path / "soft.safetensors", *options)
    assert found["label_kind"] == "logits"
    # instance norm undoes most of the other space, so the students are nearly the same
    same = evaluated(tmp_path, finished[0] / "distilled.safetensors", *options)
    (soft_mean,), (hard_mean,) = ([row["mean"] for row in each["nets"].values()] for each in (found, same))
    assert hard_mean > 0.4
    assert abs(soft_mean - hard_mean) < 0.1


def test_evaluate_refuses_what_it_cannot_test(finished, tmp_path, capsys):
    file = finished[0] / "distilled.safetensors"
    path = tmp_path / "d.safetensors"
    path.write_bytes(file.read_bytes()[:-20])
    for name, message in (
        (path, "d.safetensors: expected a pydistill file of kind 'distilled', version 1; it is truncated"),
        (finished[0] / "state.safetensors", "got 'mtt_state', version 1"),
        (tmp_path / "absent", "absent: expected a pydistill file of kind 'distilled', version 1, found no file"),
    ):
        assert message in refused(capsys, "evaluate", name)
    for options, message in (
        (["--students", 0], "--students, --net, --batch-size: expected at least 1 of each"),
        (["--net"], "--students, --net, --batch-size: expected at least 1 of each"),
        (["--batch-size", 0], "--students, --net, --batch-size: expected at least 1 of each"),
        (["--net", "vgg11"], "image_size: too small for VGG11, got (8, 8)"),
        (["--width", 0], "width: expected at least 1, got 0"),
        (["--epochs", 0], "epochs: expected at least 1, got 0"),
        (["--lr", -1], "lr: expected a positive finite number, got -1.0"),
        (["--dataset", "fashion-mnist", "--root", tmp_path / "no"], "root: expected the folder"),
        (["--json", tmp_path / "no" / "x.json"], "--json: expected a file in a folder that is there"),
    ):
        assert message in refused(capsys, "evaluate", file, *options)
    for change, message in (
        ({"width": "wide"}, "expected width (int) or none in it, got 'wide'"),
        ({"dataset": None}, "--dataset: expected the set to test on"),
    ):
        distilled = DistilledSet.load(file)
        distilled.config |= change
        distilled.save(path)
        assert message in refused(capsys, "evaluate", path)
    for images, labels, message in (
        (torch.zeros(2, 3, 8, 8), torch.arange(2), "expected images [1, 8, 8] as digits has, got 2 of [3, 8, 8]"),
        (torch.zeros(0, 1, 8, 8), torch.arange(0), "expected images [1, 8, 8] as digits has, got 0 of [1, 8, 8]"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]), "expected labels of the 10 classes of digits, got 11"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 9), "expected labels of the 10 classes of digits, got 9"),
    ):
        mean = torch.zeros(images.shape[1])
        kind = "hard" if labels.dim() == 1 else "probs"
        DistilledSet(images, labels, 0.1, mean, mean + 1, {"dataset": "digits"}, kind).save(path)
        assert message in refused(capsys, "evaluate", path)


def test_an_exported_set_is_evaluated_as_the_file_is(finished, tmp_path, capsys):
    file, folder = finished[0] / "distilled.safetensors", tmp_path / "for others"
    main(["export", str(file), str(folder)])
    assert "10 images, normalised by mean [0.3" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == ["distilled.json", "images.pt", "labels.pt", "lr.pt"]
    of_file, of_folder = (evaluated(tmp_path, each, "--students", 2) for each in (file, folder))
    assert of_folder == of_file | {"file": str(folder)}
    assert "distilled.json: expected no file there" in refused(capsys, "export", file, folder)
    main(["export", str(file), str(folder), "--overwrite"])


def fashion_mnist(folder, images):
    """Pixels as the four IDX files; each image is also a test image, and image i of class i modulo 10."""
    folder.mkdir()
    labels = torch.arange(len(images)).remainder(10).byte().numpy().tobytes()
    pixels = (images * 255).round().byte().numpy().tobytes()
    for part in ("train", "t10k"):
        for kind, dims, content in (("images-idx3", (28, 28), pixels), ("labels-idx1", (), labels)):
            header = struct.pack(f">BBBB{1 + len(dims)}i", 0, 0, 8, 1 + len(dims), len(images), *dims)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + content)


def test_a_folder_that_a_method_repository_wrote_is_evaluated(tmp_path, capsys):
    """In its normalisation, which is not that of this set: the test images are converted to it."""
    pixels = torch.rand(20, 28, 28)
    fashion_mnist(tmp_path / "fashion", pixels)
    (mean,), (std,) = REPOSITORY_NORMALISATION["fashion-mnist"]
    folder = tmp_path / "theirs"
    folder.mkdir()
    images, labels = (pixels[:, None] * 255).round() / 255, torch.arange(20).remainder(10)
    images, logits = (images - mean) / std, 5 * torch.nn.functional.one_hot(labels, 10).float()
    torch.save(images, folder / "images_best.pt")
    torch.save(logits, folder / "labels_best.pt")
    of = ("--dataset", "fashion-mnist", "--root", tmp_path / "fashion")
    assert "--lr: expected a learning rate" in refused(capsys, "evaluate", folder, *of, "--label-kind", "logits")
    assert "--label-kind: expected 'logits' or 'probs', " in refused(capsys, "evaluate", folder, *of, "--lr", 0.01)
    assert "got None" in refused(capsys, "evaluate", folder, "--lr", 0.01)
    assert "fashion-mnist or cifar10; got digits" in refused(capsys, "evaluate", folder, "--dataset", "digits")
    options = ("--lr", 0.01, "--epochs", 10, "--students", 3, "--label-kind", "logits")
    found = evaluated(tmp_path, folder, *of, *options, "--net", "mlp")
    by_hand = {"lr": 0.01, "epochs": 10, "label_kind": "logits", "students": range(3)}
    accuracies = evaluate(lambda: make("mlp", 1, 10, 28), images, logits, images, labels, **by_hand)
    assert found["nets"]["mlp"]["accuracies"] == accuracies
    pixels = images * std + mean
    own = (pixels - pixels.mean()) / pixels.std()
    assert evaluate(lambda: make("mlp", 1, 10, 28), images, logits, own, labels, **by_hand) != accuracies
    assert (found["label_kind"], found["images"], found["lr"]) == ("logits", 20, 0.01)

    zca = ZCA.fit(pixels)
    torch.save(zca(pixels), folder / "images_best.pt")
    found = evaluated(tmp_path, folder, *of, *options, "--net", "mlp", "--zca")
    accuracies = evaluate(lambda: make("mlp", 1, 10, 28), zca(pixels), logits, zca(pixels), labels, **by_hand)
    assert found["nets"]["mlp"]["accuracies"] == accuracies
    assert "got None" in refused(capsys, "evaluate", folder, "--lr", 0.01, "--zca")


def test_an_export_in_the_repositories_normalisation(finished, tmp_path, capsys):
    mean, std = torch.rand(1), torch.rand(1) + 0.1
    path = tmp_path / "d.safetensors"
    own = DistilledSet(torch.randn(4, 1, 28, 28), torch.arange(4), 0.1, mean, std, {"dataset": "fashion-mnist"})
    own.save(path)
    main(["export", str(path), str(tmp_path / "out"), "--normalised", "repositories"])
    assert "normalised by mean [0.2861] and deviation [0.353]" in capsys.readouterr().out
    pixels = torch.load(tmp_path / "out" / "images.pt") * 0.3530 + 0.2861
    torch.testing.assert_close(pixels, own.images * std + mean)
    digits = finished[0] / "distilled.safetensors"
    options = (tmp_path / "digits", "--normalised", "repositories")
    assert "fashion-mnist or cifar10; got digits" in refused(capsys, "export", digits, *options)
    assert not (tmp_path / "digits").exists()
    assert "--label-kind: expected none" in refused(capsys, "evaluate", digits, "--label-kind", "probs")
    assert "--zca: expected none" in refused(capsys, "evaluate", digits, "--zca")


def test_every_network_can_be_named():
    assert typing.get_args(NetName) == NETS


def test_every_data_set_has_settings_and_every_method_presets_that_they_fit():
    assert set(SETTINGS) == set(DATASETS) == set(get_args(DatasetName))
    for method in DISTILLING.values():
        for name in DATASETS:
            for ipc in (1, 10, 50):
                config = method.nearest_preset(name, ipc)
                inputs = method.inputs.for_method(config, dataset=name)
                assert (config.ipc, inputs.dataset) == (ipc, name)
                assert inputs.width == SETTINGS[name].width
                if config.needs_experts:
                    assert config.max_start_epoch - 1 + config.expert_epochs <= inputs.train_epochs
                assert json.loads(json.dumps(inputs.stored())) == inputs.stored()


DISTILLING = {name: method for name, method in METHODS.items() if issubclass(method, Config)}

# The gain on digits over random real images, with reduced network, iterations and students, is at least 0.05; of these:
MARGINS = dict.fromkeys(("mtt", "tesla", "ftd", "datm", "fedlgd"), 0.1)


@pytest.mark.parametrize("method", sample(DISTILLING, ("mtt", "tesla", "dc", "dm")))
def test_distilled_digits_beat_random_ones(tmp_path, capsys, method):
    iterations = 80 if method == "ast" else 40
    shorter = ["--width=16", "--students=3", "--student-epochs=60", "--whole-epochs=0", f"--iterations={iterations}"]
    if METHODS[method].needs_experts:
        shorter += ["--num-experts=3" if method == "ast" else "--num-experts=1"]  # its students overfit to a single one
    main(["distill", method, "--out", str(tmp_path / "run"), *shorter])
    accuracies = {r["set"]: torch.tensor(r["accuracies"]).mean() for r in records(tmp_path / "run", "evaluate")}
    assert accuracies.keys() == {"random", "distilled"}
    assert accuracies["distilled"] > accuracies["random"] + MARGINS.get(method, 0.05)
    assert "whole set" not in capsys.readouterr().out
