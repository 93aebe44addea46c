"""``pydistill`` from the command line: results, interruption and resumption, and messages for wrong input."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from pydistill.cli import main
from pydistill.cli.evaluate import NetName
from pydistill.data import DATASETS, REPOSITORY_NORMALISATION, DistilledSet, load, read_safetensors, renormalise
from pydistill.evaluate import evaluate
from pydistill.methods import METHODS, Config
from pydistill.methods.method import DatasetName
from pydistill.methods.settings import SETTINGS, SHAPES
from pydistill.nn import NETS, ConvNet, make
from pydistill.trajectory.store import ExpertStore
from pydistill.whitening import ZCA

OPTIONS = {
    "width": 4,
    "depth": 2,
    "image-size": 8,
    "num-experts": 2,
    "train-epochs": 2,
    "expert-epochs": 1,
    "max-start-epoch": 2,
    "syn-steps": 10,
    "iterations": 40,
    "checkpoint-every": 7,
    "student-epochs": 5,
    "whole-epochs": 1,
    "students": 2,
}
SMALL = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
RESULTS = (
    "metrics.jsonl",
    "distilled.safetensors",
    "state.safetensors",
    "experts.store",
    "images.png",
    "results.json",
)


def start(*arguments, **options):
    command = [sys.executable, "-m", "pydistill.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(folder: Path, phase: str) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["phase"] == phase]


def wait_for(process, condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    code, output = run("distill", *SMALL, "--out", folder)
    assert code == 0, output
    return folder, output


def test_a_run_leaves_its_results(finished):
    folder, output = finished
    assert all(label in output for label in ("random real", "distilled (mtt)", "whole set"))
    assert [r["iteration"] for r in records(folder, "distill")] == list(range(1, 41))
    assert {(r["expert"], r["epoch"]) for r in records(folder, "experts")} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    assert [(r["set"], len(r["accuracies"])) for r in records(folder, "evaluate")] == [
        ("random", 2),
        ("distilled", 2),
        ("whole", 2),
    ]
    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert distilled.images.shape == (10, 1, 8, 8)
    assert distilled.labels.tolist() == list(range(10))
    config = distilled.config
    assert (config["dataset"], config["method"], config["width"], config["syn_steps"]) == ("digits", "mtt", 4, 10)
    assert not {"out", "root", "resume"} & config.keys()
    with Image.open(folder / "images.png") as picture:
        assert picture.size == (10 * 68, 68)
        assert picture.convert("L").getextrema()[0] < 64
    assert sorted(os.listdir(folder)) == sorted([*RESULTS, "config.json"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_cut_off_and_resumed_is_bitwise_the_unbroken_one(finished, tmp_path, number):
    unbroken, _ = finished
    folder = tmp_path / "a run"
    process = start("distill", *SMALL, "--out", folder)
    wait_for(process, lambda: len(records(folder, "distill")) >= 4)
    process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert len(records(folder, "distill")) < 40, "the run ended before the signal came"
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert output.splitlines()[-1] == f"stopped; go on with: pydistill distill --out '{folder}' --resume"
        assert "Traceback" not in output
        _, header = read_safetensors(folder / "state.safetensors", "mtt_state")
        assert header["iteration"] == len(records(folder, "distill")), "a step that was done is lost"
    else:
        assert process.returncode == -signal.SIGKILL
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "distill", "iter')  # what a kill during a write may leave
    code, output = run("distill", "--out", folder, "--resume")
    assert code == 0, output
    for name in RESULTS:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_sigterm_while_experts_train_keeps_whole_epochs(tmp_path):
    process = start("distill", *SMALL, "--train-epochs", "100000", "--out", tmp_path / "run")
    wait_for(process, lambda: len(records(tmp_path / "run", "experts")) >= 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "--resume" in output.splitlines()[-1]
    epochs = len(records(tmp_path / "run", "experts"))
    process = start("distill", "--out", tmp_path / "run", "--resume")
    wait_for(process, lambda: len(records(tmp_path / "run", "experts")) > epochs)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130
    found = [(record["epoch"], record["expert"]) for record in records(tmp_path / "run", "experts")]
    assert found == [(1 + i // 2, i % 2) for i in range(len(found))]


def test_more_iterations_continue_a_finished_run(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    main(["distill", "--out", str(folder), "--resume", "--iterations", "43"])
    assert [r["iteration"] for r in records(folder, "distill")] == list(range(1, 44))
    assert [r["set"] for r in records(folder, "evaluate")] == ["random", "whole", "distilled"]
    assert DistilledSet.load(folder / "distilled.safetensors").config["iterations"] == 43
    assert "distilled (mtt)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["distill", "--out", str(folder), "--resume", "--iterations", "42"])
    assert "--iterations: expected at least 43, already done, got 42" in capsys.readouterr().err


EXPERTS = {"width": 4, "depth": 2, "image-size": 8, "num-experts": 3, "epochs": 24, "momentum": 0.9}
TRAIN = ["experts", *(part for name, value in EXPERTS.items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The file of experts of an uninterrupted run."""
    path = tmp_path_factory.mktemp("experts") / "experts.store"
    code, output = run(*TRAIN, "--dtype", "bf16", "--out", path)
    assert code == 0, output
    return path


@pytest.fixture(scope="module")
def few_experts(tmp_path_factory):
    """For the network and data set of `SMALL`."""
    path = tmp_path_factory.mktemp("experts") / "few.store"
    code, output = run(*TRAIN, "--num-experts", 2, "--epochs", 3, "--out", path)
    assert code == 0, output
    return path


def losses_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_name(f"{path.name}.jsonl").read_text().splitlines()]


def test_experts_killed_at_any_moment_and_resumed_are_bitwise_the_unbroken_ones(experts, tmp_path):
    path, rng = tmp_path / "experts.store", random.Random(0)
    for _ in range(4):
        before = ExpertStore(path).completed[0] if path.exists() else 0
        process = start(*TRAIN, "--dtype", "bf16", "--out", path)
        wait_for(process, lambda before=before: path.exists() and ExpertStore(path).completed[0] >= before + 2)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=180)
        assert process.returncode == -signal.SIGKILL, "the run ended before the signal came"
        with ExpertStore(path) as store:
            store.verify()
            assert before + 2 <= min(store.completed) == max(store.completed) < 24
    code, output = run(*TRAIN, "--dtype", "bf16", "--out", path)
    assert code == 0, output
    assert path.read_bytes() == experts.read_bytes()
    assert losses_in(path) == losses_in(experts)
    assert [(r["expert"], r["epoch"]) for r in losses_in(path)] == [(e, t) for t in range(1, 25) for e in range(3)]


def test_a_finished_experts_file_stays_unless_it_is_overwritten(few_experts, tmp_path, capsys):
    path = tmp_path / "experts.store"
    for suffix in ("", ".jsonl"):
        shutil.copy(f"{few_experts}{suffix}", f"{path}{suffix}")
    options = [*TRAIN, "--num-experts", "2", "--epochs", "3", "--out", str(path)]
    main(options)
    assert path.read_bytes() == few_experts.read_bytes()
    assert losses_in(path) == losses_in(few_experts)
    for changed, message in (
        (["--lr", "0.5"], "expected experts trained with lr=0.5, got 0.05"),
        (["--dtype", "bf16"], "expected experts trained with dtype='bf16', got 'fp32'"),
        (["--image-size", "10"], "expected experts trained with data_crc32="),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*options, *changed])
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
    assert path.read_bytes() == few_experts.read_bytes()
    assert losses_in(path) == losses_in(few_experts)
    main([*options, "--lr", "0.01", "--epochs", "1", "--overwrite"])
    assert ExpertStore(path).options["lr"] == 0.01
    assert [(r["expert"], r["epoch"]) for r in losses_in(path)] == [(0, 1), (1, 1)]


def test_experts_stopped_by_a_signal_say_how_to_go_on(tmp_path):
    path = tmp_path / "experts.store"
    process = start(*TRAIN, "--epochs", "100000", "--out", path)
    wait_for(process, lambda: path.exists() and ExpertStore(path).completed[0] >= 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "stopped; the same command, without --overwrite, goes on"


def test_a_run_may_take_ready_experts(few_experts, tmp_path):
    folder, own = tmp_path / "run", ("num-experts", "train-epochs")
    options = [f"--{name}={value}" for name, value in OPTIONS.items() if name not in own]
    before = few_experts.read_bytes()
    process = start("distill", *options, "--out", folder, "--experts", few_experts)
    wait_for(process, lambda: len(records(folder, "distill")) >= 4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130
    main(["distill", "--out", str(folder), "--resume"])
    assert few_experts.read_bytes() == before
    assert not records(folder, "experts")
    assert not (folder / "experts.store").exists()
    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert "num_experts" not in distilled.config
    assert "experts" not in distilled.config

    torch.save([[[torch.zeros(1)]]], tmp_path / "replay_buffer_0.pt")
    imported, exported = tmp_path / "imported.store", tmp_path / "replay_buffer_1.pt"
    ExpertStore(few_experts).export_replay_buffer(exported)
    main(["experts", "--import", str(exported), "--dataset=digits", "--no-zca", "--out", str(imported)])
    assert torch.equal(ExpertStore(imported).tensor(), ExpertStore(few_experts).tensor())
    main(["distill", *options, "--out", str(tmp_path / "other"), "--experts", str(imported)])
    names = ("distilled.safetensors", "state.safetensors", "images.png", "results.json")
    assert all((folder / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "{tmp}/absent"], "absent: expected an expert store, found no file"),
        (["--experts", "{store}", "--image-size", "10"], "few.store: expected experts of digits with crc32"),
        (["--experts", "{store}", "--width", "5"], "whose parameter features.0.weight is [5, 1, 3, 3]; got"),
        (["--experts", "{store}", "--max-start-epoch", "4"], "experts: expected at least 4 epochs of each, got 3"),
        (["--experts", "{store}", "--num-experts", "2"], "--num-experts: expected none with --experts"),
    ],
)
def test_ready_experts_that_do_not_fit_leave_nothing(few_experts, tmp_path, capsys, arguments, message):
    options = ["--width=4", "--depth=2", "--image-size=8", "--expert-epochs=1", "--max-start-epoch=2"]
    arguments = [argument.format(tmp=tmp_path, store=few_experts) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *options, "--out", str(tmp_path / "new"), *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--import", "{tmp}/absent.pt"], "absent.pt: expected a replay buffer"),
        (
            ["--import", "{tmp}/absent.pt", "--lr", "0.1", "--num-experts", "3"],
            "--num-experts, --lr: expected none with",
        ),
        (["--lr", "0"], "lr: expected a positive finite number, got 0.0"),
        (["--momentum", "-1"], "momentum: expected a finite number >= 0, got -1.0"),
        (["--num-experts", "0"], "num_experts: expected at least 1, got 0"),
        (["--width", "0"], "width"),
        (["--dataset", "cifar10"], "root: expected the folder that holds the files of cifar10"),
    ],
)
def test_wrong_arguments_of_experts_are_named_and_leave_nothing(tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["experts", "--out", str(tmp_path / "experts.store"), *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (ConvNet(3, 7, 5, 2, 32), ()),
        (ConvNet(3, 7, 5, 2, 12), ()),  # of images of another size than the data set's
        (ConvNet(3, 7, 2, 6, 70), ()),
        (ConvNet(3, 7, 5, 3, 30, norm="layer"), ("--norm", "layer", "--image-size", "30")),
        (ConvNet(1, 7, 5, 3, 28, norm="none"), ("--norm", "none")),
        (ConvNet(1, 7, 5, 3, 28, norm="layer"), ("--norm", "layer", "--dataset", "fashion-mnist")),
        (ConvNet(3, 7, 5, 2, 12, norm="batch"), ("--norm", "batch", "--image-size", "12")),
        (make("mlp", 1, 10, 28, 9), ("--net", "mlp", "--width", "9", "--dataset", "fashion-mnist")),
        (make("vit", 3, 100, 32, 16, 2), ("--net", "vit", "--width=16", "--depth=2", "--dataset=cifar100")),
    ],
)
def test_replay_buffers_of_any_network_are_imported_without_a_data_set(tmp_path, net, options):
    source, out = tmp_path / "replay_buffer_0.pt", tmp_path / "experts.store"
    torch.save([[[p.detach() + epoch for p in net.parameters()] for epoch in range(2)]], source)
    main(["experts", "--import", str(source), "--out", str(out), *options])
    with ExpertStore(out) as store:
        store.check_fits(net)
        assert store.architecture == repr(net)
        assert torch.equal(store.row(0, 0), torch.nn.utils.parameters_to_vector(net.parameters()))
        assert store.dataset == next((each for each in ("fashion-mnist", "cifar100") if each in str(options)), None)


def test_an_import_says_what_differs(tmp_path, capsys):
    net, source = ConvNet(3, 7, 5, 2, 12), tmp_path / "replay_buffer_0.pt"
    torch.save([[[p.detach() + epoch for p in net.parameters()] for epoch in range(2)]], source)
    command = ("experts", "--import", source, "--out", tmp_path / "experts.store")
    assert "features.0.weight: expected torch.float32 [6, 3, 3, 3], got" in refused(capsys, *command, "--width", 6)
    assert "classifier.weight: expected torch.float32 [7, 80]" in refused(capsys, *command, "--image-size", 16)
    assert "expected 6 tensors as net has, got 10" in refused(capsys, *command, "--norm", "none")
    assert "--zca, --no-zca: expected one of them" in refused(capsys, *command, "--zca", "--no-zca")
    assert "--no-zca: expected with --import only" in refused(capsys, "experts", "--out", source, "--no-zca")
    assert os.listdir(tmp_path) == ["replay_buffer_0.pt"]


def test_shapes_are_those_of_the_sets_as_they_are_read():
    digits = load("digits")
    assert SHAPES["digits"] == (digits.channels, digits.num_classes, digits.image_size)
    assert SHAPES.keys() == set(typing.get_args(DatasetName)) == set(DATASETS)


def evaluated(tmp_path, *arguments):
    """The JSON that ``pydistill evaluate`` writes."""
    main(["evaluate", *map(str, arguments), "--json", str(tmp_path / "found.json")])
    return json.loads((tmp_path / "found.json").read_text())


def refused(capsys, *arguments):
    """The one line that a command prints before it exits with 1."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


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
    assert "'logits' or 'probs' (--label-kind), " in refused(capsys, "evaluate", folder, *of, "--lr", 0.01)
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


def test_a_resumed_run_keeps_its_options(finished, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--out", str(finished[0]), "--resume", "--lr-img", "3"])
    assert stopped.value.code == 1
    assert f"--lr-img: expected 100.0 as the run in {finished[0]} has, got 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume: expected --out"),
        (["--out", "{tmp}/full"], "--out: expected a new or empty folder"),
        (["--out", "{tmp}/full/file"], "--out: expected a folder"),
        (["--out", "{tmp}/full", "--resume"], "config.json: expected the options of a run of mtt"),
        (["--out", "{tmp}/odd", "--resume"], "config.json: expected the options of a run of mtt; it is"),
        (["--out", "{tmp}/new", "--dataset", "cifar10"], "root: expected the folder that holds the files of cifar10"),
        (["--out", "{tmp}/new", "--dataset", "cifar10", "--root", "{tmp}/full"], "data_batch_1: expected a CIFAR-10"),
        (["--out", "{tmp}/new", "--ipc", "0"], "ipc: expected a finite number of at least 1, got 0"),
        (["--out", "{tmp}/new", "--ipc", "5000"], "ipc: expected at most 142"),
        (["--out", "{tmp}/new", "--students", "0"], "--students: expected at least 1, got 0"),
        (["--out", "{tmp}/new", "--depth", "9"], "depth: 9 blocks leave nothing"),
        (
            ["nonsense", "--out", "{tmp}/new"],
            "method: expected one of mtt, tesla, ftd, ",
        ),
        (["--out", "{tmp}/new", "--dataset", "svhn"], "--dataset: expected one of digits, fashion-mnist, cifar10"),
        (["--out", "{tmp}/new", "--ipc", "one"], "--ipc: expected a whole number, got 'one'"),
        (["--out", "{tmp}/new", "--experts", "{tmp}/full/file", "--lr-expert", "3"], "--lr-expert: expected none with"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(tmp_path, capsys, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"method": "mt')
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed: expected a finite number"),
        (["--augment", "flip_melt"], "strategy: expected names out of color"),
        (["tesla", "--syn-steps", "0"], "syn_steps: expected a finite number"),
        (["--window", "3"], "Unrecognized options: --window"),
    ],
)
def test_wrong_hyper_parameters_are_refused_while_parsing(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *arguments, "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_a_run_that_diverges_says_where_and_can_be_looked_at(finished, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *SMALL, "--lr-teacher", "1e30", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert "step" in capsys.readouterr().err
    assert len(records(tmp_path / "run", "experts")) == 4


@pytest.mark.parametrize(
    ("module", "package"), [("tyro", "tyro"), ("rich", "rich"), ("PIL", "pillow"), ("psutil", "psutil")]
)
def test_a_missing_package_is_one_sentence(module, package):
    code = f"import sys; sys.modules[{module!r}] = None; from pydistill.cli import main; main(['distill'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    sentence = f"pydistill: the command line needs {package}, which is not installed: pip install 'pydistill[cli]'"
    assert done.stderr.strip() == sentence


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

# The least gain of each method on digits over random real images, with reduced network, iterations and students.
MARGINS = {"mtt": 0.1, "tesla": 0.1, "ftd": 0.1, "ast": 0.05, "datm": 0.1, "fyi": 0.05, "rat_bptt": 0.05}
MARGINS |= {"dc": 0.05, "dsa": 0.05}
MARGINS |= {"fedlgd": 0.1} | dict.fromkeys(("dm", "datadam", "atom", "fyi_dm", "fyi_dsa"), 0.05)


@pytest.mark.parametrize("method", DISTILLING)
def test_distilled_digits_beat_random_ones(tmp_path, capsys, method):
    iterations = 80 if method == "ast" else 40
    shorter = ["--width=16", "--students=3", "--student-epochs=60", "--whole-epochs=0", f"--iterations={iterations}"]
    if METHODS[method].needs_experts:
        shorter += ["--num-experts=3" if method == "ast" else "--num-experts=1"]  # its students overfit to a single one
    main(["distill", method, "--out", str(tmp_path / "run"), *shorter])
    accuracies = {r["set"]: torch.tensor(r["accuracies"]).mean() for r in records(tmp_path / "run", "evaluate")}
    assert accuracies.keys() == {"random", "distilled"}
    assert accuracies["distilled"] > accuracies["random"] + MARGINS[method]
    assert "whole set" not in capsys.readouterr().out
