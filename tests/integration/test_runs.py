"""Common to every command that fills a folder: refusals come first, one process writes, metrics have no gaps."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pydistill._atomic import naming, write_atomic
from pydistill.cli import main
from pydistill.cli.console import Bars, percentage, plain_console
from pydistill.data import Dataset, read_safetensors
from pydistill.methods import MTT, RaTBPTT, distill
from pydistill.methods.folder import Folder, append_line, keep_lines, locked
from pydistill.methods.settings import SETTINGS
from pydistill.methods.trajectory.matching import LEAST_LR
from pydistill.nn import ConvNet
from pydistill.trajectory import FlatModule, train_students

NET = ("--network", "convnet", "--width", "4", "--depth", "2", "--image-size", "8")
SQUEEZE = ("squeeze", "--dataset", "digits", *NET, "--epochs", "6", "--lr", "0.05")
SMALL = ("--width", "4", "--depth", "2", "--image-size", "8", "--students", "1", "--student-epochs", "1")


def run(*arguments):
    main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line that a command prints before it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def records(folder: Path, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, images and labels."""
    folder = tmp_path_factory.mktemp("made")
    run(*SQUEEZE, "--out", folder / "teacher")
    teacher = folder / "teacher" / "teacher.safetensors"
    run("recover", "--teacher", teacher, "--ipc", 1, "--iterations", 4, "--out", folder / "images")
    images = folder / "images" / "distilled.safetensors"
    run("relabel", "--images", images, "--teacher", teacher, "--epochs", 3, "--out", folder / "labels")
    return {"teacher": teacher, "images": images, "labels": folder / "labels" / "labels.store"}


REFUSED = {
    "distill mtt --train-epochs 2 --max-start-epoch 5": "--train-epochs: expected at least 6 (--max-start-epoch 5 and",
    "distill mtt --student-epochs 0": "--student-epochs: expected at least 1, got 0",
    "distill mtt --whole-epochs -1": "--whole-epochs: expected at least 0, got -1",
    "distill mtt --lr-student 0": "--lr-student: expected a positive finite number, got 0.0",
    "distill mtt --lr-expert nan": "--lr-expert: expected a positive finite number, got nan",
    "distill mtt --batch-train 0": "--batch-train: expected at least 1, got 0",
    "distill rat_bptt --classes 11": "--classes: expected at most the 10 there are, got 11",
    "distill fedlgd --clients 900": "--clients: expected few enough that each has images",
    "distill unip --image-size 10": "--patch-size: expected a divisor of image_size",
    "distill hello --ipc 5000": "--ipc: expected at most",
    "distill hello --image-size 2": "--image-size: too small for Encoder",
    "distill krr_st --batch-real 5000": "--batch-real: expected at most 1433, got 5000",
    "distill krr_st --depth 9": "--image-size: too small for Encoder",
    "select dq --ipc 5 --bins 2 --bin-size 2": "--ipc: expected at most 4, the images in the bins of a class, got 5",
    "select dq --keep 0.5 --patch-size 3": "--patch-size: expected a divisor of the images' [16, 16] pixels, got 3",
    "select pca --factor 3": "--factor: expected a divisor of 16 and 16, got 3",
    "select pca --depth 9": "depth",
    "squeeze --dataset fashion-mnist --root {tmp}/absent": "--root: expected the folder that holds the files of",
    "squeeze --depth 9": "depth",
    "squeeze --dataset image-folder --image-size 8 --root {tmp}": "image-folder|--root: expected train",
    "recover --teacher {teacher} --checkpoint-every 0": "--checkpoint-every: expected at least 1, got 0",
    "recover --method dwa --teacher {teacher} --root {tmp}": "--root: expected none, digits come with scikit-learn",
    "relabel --images {images} --teacher {other}": "--teacher: expected images of [1, 8, 8], got [1, 10, 10]",
    "post-train --images {images} --labels {labels} --students 0": "--students: expected at least 1, got 0",
    "post-train --images {images} --labels {labels} --depth 9": "depth",
    "post-train --images {images} --labels {foreign}": "foreign.store: expected labels and views that relabel made",
}


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    from pydistill.labels import SoftLabelStore

    folder = tmp_path_factory.mktemp("files")
    run(*SQUEEZE, "--epochs", "1", "--image-size", "10", "--out", folder / "other")
    options = {"num_images": 10, "num_classes": 10, "epochs": 1, "format": "fp16", "T": 1.0}
    SoftLabelStore.create(folder / "foreign.store", **options, batch_size=5).close()
    return made | {"other": folder / "other" / "teacher.safetensors", "foreign": folder / "foreign.store"}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_run_is_refused_before_its_folder_is_made(line, files, tmp_path, capsys):
    out = tmp_path / "out"
    error = refused(capsys, *line.format(tmp=tmp_path, **files).split(), "--out", out)
    assert any(message in error for message in REFUSED[line].split("|")), error
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [
        ("distill", "mtt", *SMALL),
        ("distill", "fedlgd", *SMALL),
        ("distill", "unip"),
        ("distill", "hello"),
        ("distill", "krr_st"),
        ("select", "dq"),
        ("select", "pca"),
        SQUEEZE,
        ("recover", "--teacher", "{teacher}"),
        ("relabel", "--images", "{images}", "--teacher", "{teacher}"),
        ("post-train", "--images", "{images}", "--labels", "{labels}"),
    ],
    ids=" ".join,
)
def test_one_process_writes_to_a_folder(command, made, tmp_path, capsys):
    command = [part.format(**made) for part in command]
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    with locked(tmp_path / ".lock", ""):
        error = refused(capsys, *command, "--out", tmp_path)
    assert f"--out: expected a folder that no other process writes to, got {tmp_path}: another does" in error
    assert not any(tmp_path.iterdir())


def test_one_process_writes_to_a_file_of_experts(tmp_path, capsys):
    out = tmp_path / "experts.store"
    (tmp_path / "experts.store.jsonl").write_text('{"expert": 0, "epoch": 1}\n')
    with locked(tmp_path / ".experts.store.lock", ""):
        assert f"expected a file that no other process writes to, got {out}" in refused(capsys, "experts", "--out", out)
    assert len(records(tmp_path, "experts.store.jsonl")) == 1
    # nor do refused options empty the log of the existing experts
    assert "lr: expected" in refused(capsys, "experts", "--out", out, "--lr", "0", "--overwrite")
    assert len(records(tmp_path, "experts.store.jsonl")) == 1
    assert "--out: expected a file in a folder" in refused(capsys, "experts", "--out", tmp_path / "no" / "x.store")


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = """
import os, pathlib, signal, sys
from pydistill.methods.folder import locked
with locked(pathlib.Path(sys.argv[1]) / ".lock", ""):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    folder = Folder(tmp_path, None)  # empty but for that
    with folder.held():
        folder.begin({"a": 1})
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="this file system has no locks"), locked(tmp_path / ".lock", ""):
        pass


class Killed(BaseException):
    pass


def killed_in(monkeypatch, module, name, times, *arguments):
    """Runs a command that dies in the given call of a function, before it does anything."""
    calls = iter(range(times))
    kept = getattr(module, name)

    def dying(*args, **options):
        if next(calls, None) is None:
            raise Killed
        return kept(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dying)
        with pytest.raises(Killed):
            run(*arguments)


def steps(folder, *names):
    return [tuple(record[name] for name in names) for record in records(folder)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["append_line", "write_safetensors"])
def test_squeeze_and_post_train_log_an_epoch_once(function, made, tmp_path, monkeypatch):
    from pydistill.methods import runs

    student = ("post-train", "--images", made["images"], "--labels", made["labels"], *NET[:6], "--students", 2)
    for command, expected in (
        (SQUEEZE, [("squeeze", epoch) for epoch in range(1, 7)]),
        (student, [(f"student{number}", epoch) for number in (0, 1) for epoch in (1, 2, 3)]),
    ):
        out = tmp_path / command[0]
        killed_in(monkeypatch, runs, function, 4, *command, "--out", out)
        run(*command, "--out", out, "--resume")
        assert steps(out, "phase", "epoch") == expected
        before = (out / "metrics.jsonl").read_bytes()
        run(*command, "--out", out, "--resume")
        assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("function", ["runs.append_line", "recover.write_safetensors"])
def test_recover_logs_a_checkpoint_once(function, made, tmp_path, monkeypatch):
    from pydistill.methods import runs
    from pydistill.methods.decoupled import recover

    options = ("--ipc", 1, "--iterations", 6, "--batch-size", 5, "--checkpoint-every", 2)
    command = ("recover", "--teacher", made["teacher"], *options, "--out", tmp_path / "out")
    module, name = function.split(".")
    killed_in(monkeypatch, {"runs": runs, "recover": recover}[module], name, 5, *command)
    run(*command, "--resume")
    assert steps(tmp_path / "out", "batch", "iteration") == [(b, i) for b in (0, 1) for i in (2, 4, 6)]


def test_relabel_logs_an_epoch_once(made, tmp_path, monkeypatch):
    from pydistill.methods import runs

    options = ("--images", made["images"], "--teacher", made["teacher"], "--epochs", 5)
    command = ("relabel", *options, "--out", tmp_path / "out")
    killed_in(monkeypatch, runs, "append_line", 3, *command)
    for _ in range(2):
        run(*command, "--resume")
        assert steps(tmp_path / "out", "epoch") == [(epoch,) for epoch in range(5)]


def test_distill_logs_an_accuracy_once(tmp_path, monkeypatch):
    from pydistill.methods import distilling

    command = ("distill", "dm", *SMALL, "--iterations", 3, "--whole-epochs", 1, "--out", tmp_path / "out")
    killed_in(monkeypatch, distilling, "write_atomic", 0, *command)  # of the first set's accuracies
    run("distill", "--out", tmp_path / "out", "--resume")
    found = [(r["phase"], r.get("iteration", r.get("set"))) for r in records(tmp_path / "out")]
    assert found == [
        ("distill", 1),
        ("distill", 2),
        ("distill", 3),
        *(("evaluate", s) for s in ("random", "distilled", "whole")),
    ]


def test_hello_logs_a_student_once(tmp_path, monkeypatch):
    from pydistill.methods import runs

    small = (
        "--encoder-epochs 1 --encoder-width 4 --teachers 1 --teacher-epochs 1 --fit-epochs 1 --ipc 1 --image-steps 1"
    )
    command = ("distill", "hello", *small.split(), "--student-epochs", 1, "--students", 1, "--out", tmp_path / "out")
    killed_in(monkeypatch, runs, "append_line", 2, *command)
    run(*command, "--resume")
    assert steps(tmp_path / "out", "labels") == [("hard",), ("stored",), ("projector",)]


def test_lines_that_a_kill_broke_are_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}')  # the last one lacks only its line end
    keep_lines(path, lambda record: record["a"] != 2)
    append_line(path, {"a": 4})
    assert [record["a"] for record in records(tmp_path)] == [1, 3, 4]


def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    """Writing to /dev/full behaves like a full disk."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_line(Path("/dev/full"), {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/state'"):
        write_atomic(tmp_path / "state", b"")
    assert not any(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="absent"), naming(tmp_path):  # an existing name stays
        (tmp_path / "absent").open()


@pytest.mark.parametrize("name", ["run[ipc1]", "a[/b]", ":smile:", "[red]x"])
def test_a_path_is_printed_as_it_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*SQUEEZE, "--epochs", "1", "--out", name)
    out = capsys.readouterr().out
    assert f"squeeze -> {name}\n" in out
    assert f"; teacher.safetensors is in {name}\n" in out


def test_a_progress_bar_shows_a_name_as_it_is():
    import io

    console = plain_console(file=io.StringIO(), force_terminal=True, width=200)
    with Bars(console) as bars:
        bars.bar("students on [/b]", 1)(0, "[bold]")
    shown = console.file.getvalue()
    assert "students on [/b]" in shown
    assert "[bold]" in shown


def test_accuracies_are_percentages(made, tmp_path, capsys):
    run(*SQUEEZE, "--out", tmp_path / "out")
    accuracy = json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"]
    assert f"accuracy {100 * accuracy:.1f} %; " in capsys.readouterr().out
    assert percentage([0.5, 0.25]) == "37.5 ± 12.5 %"


def tiny(**changes):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 2
    about = {"class_names": ("a", "b"), "mean": torch.zeros(1), "std": torch.ones(1)}
    data = Dataset("tiny", images, labels, images, labels, **about)
    net = ConvNet(1, 2, 4, 2, 8)
    start = FlatModule(net).parameters()
    experts = torch.stack([start, start + 0.1, start + 0.2])[None]
    config = MTT(**{"iterations": 3, "syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 2, **changes})
    return config, data, net, experts


@pytest.mark.parametrize("lr_lr", [1e-5, 100.0])
def test_the_learnt_rate_stays_positive(lr_lr):
    """The rate is otherwise unaffected: only an outer step that leads below the bound is shortened."""
    config, *rest = tiny(lr_lr=lr_lr, lr_teacher=0.01, lr_img=0.0)
    seen = []
    result = distill(config, *rest, on_step=lambda state, record: seen.append(record))
    least = LEAST_LR * 0.01
    if lr_lr == 1e-5:
        assert not any("lr_below" in record for record in seen)
        assert result.lr != pytest.approx(least, rel=0.5)
        return
    below = [record for record in seen if "lr_below" in record]
    assert below
    for record in below:
        assert record["lr_below"] < least
        assert record["lr"] == pytest.approx(least)
    assert min(record["lr"] for record in seen) > 0


def test_the_presets_of_an_image_folder_suit_few_pictures():
    """Experts on some hundred pictures move little: with batches of 256 and rates meant for thousands, only the first
    step would have an effect: a loss of 80, a rate below zero, images moved by thousands."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(320) % 4
    images = torch.randn(4, 3, 16, 16, generator=generator)[labels]
    images = images + torch.randn(320, 3, 16, 16, generator=generator)
    about = {"class_names": tuple("abcd"), "mean": torch.zeros(3), "std": torch.ones(3)}
    data, setting = Dataset("folder", images, labels, images, labels, **about), SETTINGS["image-folder"]
    net = ConvNet(3, 4, 8, 2, 16)
    theta = [FlatModule(net).parameters()[None]]
    for epoch in range(2):
        options = {"epochs": 1, "lr": setting.lr_expert, "batch_size": setting.batch_train}
        order = torch.Generator().manual_seed(epoch)
        theta.append(train_students(net, theta[-1], images, labels, **options, generator=order).theta)
    config = replace(MTT.preset("image-folder", 1), max_start_epoch=1, iterations=5)
    seen = []
    distill(config, data, net, torch.stack(theta, 1), on_step=lambda state, record: seen.append(record))
    assert not any("lr_below" in record for record in seen)
    assert seen[-1]["loss"] < seen[0]["loss"] < 20


def test_what_stops_being_finite_names_its_step_and_the_rates():
    config, *rest = tiny(lr_img=1e30)
    with pytest.raises(FloatingPointError, match=r"^iteration [123]: .*smaller rates may help \(lr_img=1e\+30, lr_lr="):
        distill(config, *rest)
    config, *rest = tiny(lr_teacher=1e30)
    with pytest.raises(FloatingPointError, match=r"^iteration 1: the student's parameters became non-finite in step 2"):
        distill(config, *rest)
    with pytest.raises(FloatingPointError) as found:
        distill(config, *rest)
    assert "check_finite" not in str(found.value)  # which no command has


def test_students_on_the_result_need_a_rate():
    with pytest.raises(ValueError, match="lr_teacher: expected a positive number, got 0"):
        MTT(lr_teacher=0.0)
    with pytest.raises(ValueError, match="lr_eval: expected a positive number, got 0"):
        RaTBPTT(lr_eval=0.0)


def test_a_state_of_before_still_resumes(tmp_path):
    """The fields of a state file have not changed: a run begun earlier can be resumed."""
    from pydistill.methods import State

    config, data, net, experts = tiny()
    state = config.initial(data, net, experts)
    state.save(tmp_path / "state", config)
    assert sorted(read_safetensors(tmp_path / "state", "mtt_state")[1]["config"]) == [
        "augment", "batch_syn", "expert_epochs", "ipc", "iterations", "lr_img", "lr_lr", "lr_teacher",
        "max_start_epoch", "min_start_epoch", "mode", "momentum", "precision", "seed", "segments", "student_momentum",
        "syn_steps", "zca",
    ]  # fmt: skip
    assert State.load(tmp_path / "state", config).iteration == 0


def test_several_processes_agree_on_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out: expected a folder, which several processes have to agree on" in refused(capsys, "distill", "dm")
