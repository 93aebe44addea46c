"""``pydistill squeeze | recover | relabel | post-train``: the pipeline, killed runs, ranks, and what they refuse."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from pydistill.cli import main
from pydistill.data import DistilledSet
from pydistill.labels import SoftLabelStore
from pydistill.methods.decoupled.squeeze import Teacher

NET = ("--network", "convnet", "--width", "4", "--depth", "2")
RECOVER = ("--ipc", "2", "--iterations", "60", "--batch-size", "8", "--checkpoint-every", "3")
RELABEL = ("--epochs", "30", "--batch-size", "8")


def run(*arguments):
    main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def start(*arguments, ranks=1):
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["pydistill.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads as torchrun's ranks have: torch's convolutions promise equal bits only for equal numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, a recovered set and its labels, each by one uninterrupted process."""
    folder = tmp_path_factory.mktemp("made")
    squeezing = ("--dataset", "digits", "--image-size", "8", *NET, "--epochs", "3", "--lr", "0.05")
    run("squeeze", *squeezing, "--out", folder / "teacher")
    teacher = folder / "teacher" / "teacher.safetensors"
    run("recover", "--method", "sre2l", "--teacher", teacher, *RECOVER, "--out", folder / "images")
    images = folder / "images" / "distilled.safetensors"
    run("relabel", "--images", images, "--teacher", teacher, *RELABEL, "--out", folder / "labels")
    return {"folder": folder, "teacher": teacher, "images": images, "labels": folder / "labels" / "labels.store"}


def test_each_step_takes_the_files_of_the_one_before(made, tmp_path):
    accuracy = json.loads((made["folder"] / "teacher" / "results.json").read_text())["accuracy"]
    assert accuracy > 0.5
    teacher = Teacher.load(made["teacher"])
    assert teacher.shape == (1, 8, 8)
    distilled = DistilledSet.load(made["images"])
    assert distilled.images.shape == (20, 1, 8, 8)
    assert distilled.labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert distilled.config["method"] == "sre2l"
    assert (distilled.pixels().amin(), distilled.pixels().amax()) >= (0, 0.5)
    with torch.no_grad():
        found = (teacher.net(distilled.images).argmax(1) == distilled.labels).float().mean()
    assert found > 0.8
    assert (made["images"].parent / "images.png").read_bytes().startswith(b"\x89PNG")
    store = SoftLabelStore.open(made["labels"])
    store.check_complete()
    assert (store.epochs, store.num_images, store.T) == (30, 20, 20)

    student = ("post-train", "--images", made["images"], "--labels", made["labels"], *NET, "--students", "2")
    run(*student, "--out", tmp_path / "soft")
    run(*student, "--hard", "--out", tmp_path / "hard")
    for kind in ("soft", "hard"):
        results = json.loads((tmp_path / kind / "results.json").read_text())
        assert len(results["accuracy"]) == 2
        records = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert [r["epoch"] for r in records if r["phase"] == "student1"] == list(range(1, 31))
        assert records[29]["loss"] < records[0]["loss"]
    with_student = Teacher.load(tmp_path / "soft" / "student1.safetensors")
    assert with_student.net(distilled.images).shape == (20, 10)


def test_what_a_format_costs_is_said_where_labels_are_made_and_used(made, tmp_path, capsys):
    capsys.readouterr()
    relabel = (
        "relabel",
        "--images",
        made["images"],
        "--teacher",
        made["teacher"],
        "--epochs",
        "2",
        "--batch-size",
        "8",
    )
    said = "error of the student's gradients: "
    for format, bound in (("features8", 0.05), ("topk8", 10.0)):
        k = ("--k", "2") if format == "topk8" else ()
        run(*relabel, "--format", format, *k, "--out", tmp_path / format)
        error = json.loads((tmp_path / format / "results.json").read_text())["gradient_error"]
        assert 0 < error["fresh"] < bound
        assert 0 < error["near"] < bound
        shown = f"labels in {'topk8, k=2 of 10' if format == 'topk8' else format}, at temperature 20; {said}"
        told = " ".join(capsys.readouterr().out.split())  # lines are wrapped
        assert f"{shown}{100 * error['fresh']:.2g} % for a fresh student, " in told
    labels = tmp_path / "features8" / "labels.store"
    run("post-train", "--images", made["images"], "--labels", labels, *NET, "--out", tmp_path / "student")
    assert f"labels in features8, at temperature 20; {said}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("step", ["recover", "relabel"])
def test_a_killed_run_resumes_to_the_same_bytes(made, tmp_path, step):
    out = tmp_path / "killed"
    if step == "recover":
        arguments = ("--method", "sre2l", "--teacher", made["teacher"], *RECOVER)
        watched, whole = out / "parts", made["images"]
    else:
        arguments = ("--images", made["images"], "--teacher", made["teacher"], *RELABEL)
        watched, whole = out / "labels.store", made["labels"]
    process = start(step, *arguments, "--out", out)
    deadline = time.monotonic() + 200
    while not (watched.exists() and (step == "relabel" or any(watched.iterdir()))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random(time.time()).uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(step, *arguments, "--out", out, "--resume")
    assert (out / whole.name).read_bytes() == whole.read_bytes()
    before = (out / whole.name).read_bytes()
    run(step, *arguments, "--out", out, "--resume")  # nothing is left to do
    assert (out / whole.name).read_bytes() == before


@pytest.mark.exhaustive
def test_two_ranks_make_the_bytes_of_one(made, tmp_path):
    ranks = {
        "recover": ("--method", "sre2l", "--teacher", made["teacher"], *RECOVER),
        "relabel": ("--images", made["images"], "--teacher", made["teacher"], *RELABEL),
    }
    for step, arguments in ranks.items():
        process = start(step, *arguments, "--out", tmp_path / step, ranks=2)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        name = made["images"].name if step == "recover" else made["labels"].name
        whole = made["images"] if step == "recover" else made["labels"]
        assert (tmp_path / step / name).read_bytes() == whole.read_bytes()
        lines = (tmp_path / step / "metrics-rank1.jsonl").read_text().splitlines()
        numbers = {json.loads(line)["batch" if step == "recover" else "epoch"] for line in lines}
        assert all(number % 2 == 1 for number in numbers)
        assert numbers


def test_what_does_not_fit_is_refused_by_name(made, tmp_path, capsys):
    recover = ("recover", "--teacher", made["teacher"], *RECOVER)
    assert "--method: expected one of sre2l, cda, dwa, infer, random, got 'mtt'" in fails(
        capsys, *recover, "--method", "mtt", "--out", tmp_path / "a"
    )
    assert "--out: expected a new or empty folder" in fails(capsys, *recover, "--out", made["folder"])
    assert "expected the options of a run of recover to go on with, found no file" in fails(
        capsys, *recover, "--out", tmp_path / "a", "--resume"
    )
    other = ("recover", "--teacher", made["teacher"], *RECOVER, "--lr", "0.3")
    assert "--lr: expected 0.25 as the run in" in fails(capsys, *other, "--out", made["folder"] / "images", "--resume")
    other = (*recover, "--precision", "bf16", "--out", made["folder"] / "images", "--resume")
    assert "--precision: expected auto as the run in" in fails(capsys, *other)
    steps = {
        "squeeze": ("--dataset", "digits", *NET),
        "recover": ("--teacher", made["teacher"], *RECOVER),
        "relabel": ("--images", made["images"], "--teacher", made["teacher"]),
        "post-train": ("--images", made["images"], "--labels", made["labels"]),
    }
    for step, options in steps.items():
        given = (step, *options, "--precision", "fp16", "--device", "cpu", "--out", tmp_path / "fp16")
        assert "precision: expected 'ieee' or 'bf16' on cpu, got 'fp16'" in fails(capsys, *given)
    assert not (tmp_path / "fp16").exists()
    assert "expected a pydistill file of kind 'teacher'" in fails(
        capsys, "recover", "--teacher", made["images"], *RECOVER, "--out", tmp_path / "b"
    )
    assert "--dataset: expected one of digits" in fails(capsys, "squeeze", "--dataset", "mnist")
    weights = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    imported = ("squeeze", "--dataset", "digits", "--weights", weights, "--out", tmp_path / "c")
    assert "weights.pth: expected the weights of a convnet" in fails(capsys, *imported)
    assert "convnet under 'ema'; got a dict of conv1.weight" in fails(capsys, *imported, "--weights-key", "ema")
    assert "network: expected 'package.module:function', got 'make'" in fails(
        capsys, *recover, "--network", "make", "--out", tmp_path / "b"
    )

    half = tmp_path / "half.store"
    whole = SoftLabelStore.open(made["labels"])
    options = {name: getattr(whole, name) for name in ("num_images", "num_classes", "epochs", "format", "T")}
    options |= {"record_bytes": whole.record_bytes, "batch_size": whole.batch_size, "metadata": whole.metadata}
    SoftLabelStore.create(half, **options).close()
    post = ("post-train", "--images", made["images"], *NET)
    assert "half.store: expected all of 30 epochs, 30 lack labels" in fails(
        capsys, *post, "--labels", half, "--out", tmp_path / "d"
    )
    damaged = bytearray(made["labels"].read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 700] = bytes(255 - each for each in damaged[middle : middle + 700])  # a block or more
    (tmp_path / "damaged.store").write_bytes(damaged)
    assert "damaged" in fails(capsys, *post, "--labels", tmp_path / "damaged.store", "--out", tmp_path / "e")
    assert "expected a pydistill file of kind 'distilled'" in fails(
        capsys, "post-train", "--images", made["teacher"], "--labels", half
    )
