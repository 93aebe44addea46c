"""``pydistill distill`` and ``experts``: results, interruption and resumption, and messages for wrong input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image

from pydistill.cli import main
from pydistill.data import DATASETS, DistilledSet, load, read_safetensors
from pydistill.methods.method import DatasetName
from pydistill.methods.settings import SHAPES
from pydistill.nn import ConvNet, make
from pydistill.trajectory.store import ExpertStore
from tests.integration.commands import OPTIONS, SMALL, records, refused, run, start

RESULTS = (
    "metrics.jsonl",
    "distilled.safetensors",
    "state.safetensors",
    "experts.store",
    "images.png",
    "results.json",
)

PRECISIONS = "auto, ieee, bf16, tf32, tf32-conv, tf32-matmul, fp32"


def wait_for(process, condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


@pytest.mark.exhaustive
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
        (["--lr", "0.5"], "expected experts trained with --lr 0.5, got 0.05; --overwrite starts anew"),
        (["--dtype", "bf16"], "expected experts trained with --dtype 'bf16', got 'fp32'"),
        (["--image-size", "10"], "expected experts trained with data_crc32="),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*options, *changed])
        assert stopped.value.code == 2
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
        (
            ["--experts", "{store}", "--num-experts", "2"],
            "--num-experts: expected none with --experts FILE",
        ),
    ],
)
def test_ready_experts_that_do_not_fit_leave_nothing(few_experts, tmp_path, capsys, arguments, message):
    options = ["--width=4", "--depth=2", "--image-size=8", "--expert-epochs=1", "--max-start-epoch=2"]
    arguments = [argument.format(tmp=tmp_path, store=few_experts) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *options, "--out", str(tmp_path / "new"), *arguments])
    assert stopped.value.code == 2
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
        (["--num-experts", "0"], "--num-experts: expected at least 1, got 0"),
        (["--width", "0"], "width"),
        (["--dataset", "cifar10"], "root: expected the folder that holds the files of cifar10"),
    ],
)
def test_wrong_arguments_of_experts_are_named_and_leave_nothing(tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["experts", "--out", str(tmp_path / "experts.store"), *arguments])
    assert stopped.value.code == 2
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


def test_a_resumed_run_keeps_its_options(finished, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--out", str(finished[0]), "--resume", "--lr-img", "3"])
    assert stopped.value.code == 2
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
            ["mttt", "--out", "{tmp}/new"],
            ", hello, unip, got 'mttt'; did you mean mtt?; pydistill --help has all commands",
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
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed: expected a finite number"),
        (["--augment", "flip_melt"], "--augment: expected names out of color"),
        (["tesla", "--syn-steps", "0"], "--syn-steps: expected a finite number"),
        (["--window", "3"], "--window: pydistill distill mtt has no such option; pydistill distill mtt --help"),
        (["--syn-step", "3"], "has no such option; did you mean --syn-steps?; pydistill distill mtt --help has all"),
        (["--iterations"], "--iterations: expected a value, got none"),
        (["--iterations", "1.5"], "--iterations: expected a whole number, got '1.5'"),
        (["--lr-img", "fast"], "--lr-img: expected a number, got 'fast'"),
        (["--precision", "fp33"], f"--precision: expected one of {PRECISIONS}, got 'fp33'; did you mean fp32?"),
        (["mtt", "tesla"], "tesla: pydistill distill mtt has no such option"),
    ],
)
def test_wrong_hyper_parameters_are_refused_while_parsing(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, "distill", *arguments, "--out", tmp_path / "new")
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
