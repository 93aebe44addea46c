"""Options that no run can have are refused in one line, before a folder is made, in every command."""

import pytest
import torch

from pydistill.cli import main
from pydistill.methods import DC, DECOUPLED, METHODS, OptionError, run
from tests.integration.commands import refused

DISTILLING = [f"distill {name}" for name, m in METHODS.items() if m.group in ("images", "networks")]
PICKING = [f"select {name}" for name, m in METHODS.items() if m.group == "selection"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small teacher, images and labels."""
    folder = tmp_path_factory.mktemp("made")
    small = ("--width=4", "--depth=2", "--image-size=8")
    main(["squeeze", *small, "--epochs=1", f"--out={folder / 'teacher'}"])
    teacher = f"--teacher={folder / 'teacher/teacher.safetensors'}"
    main(["recover", teacher, "--ipc=1", "--iterations=1", f"--out={folder / 'images'}"])
    images = f"--images={folder / 'images/distilled.safetensors'}"
    main(["relabel", images, teacher, "--epochs=1", f"--out={folder / 'labels'}"])
    return {"teacher": teacher, "images": images, "labels": f"--labels={folder / 'labels/labels.store'}"}


NEEDS = {"recover": ("teacher",), "relabel": ("images", "teacher"), "post-train": ("images", "labels")}


def command(words, made):
    parts = words.split()
    return [*parts, *(made[name] for name in NEEDS.get(parts[0], ()))]


def complaint(capsys, *arguments):
    """What a command says before it fails: in a line, or in the box about its options, which breaks lines."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code in (1, 2)
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("words", [*DISTILLING, *PICKING, "squeeze", *NEEDS, "experts", "evaluate"])
def test_a_device_that_is_not_here(capsys, tmp_path, made, words):
    out = tmp_path / "out"
    arguments = command(words, made)
    if words == "evaluate":
        arguments.append(made["images"].removeprefix("--images="))
    else:
        arguments.append(f"--out={out}")
    there = torch.accelerator.device_count()
    for name in ("foo", "meta", f"cuda:{there}", "cpu:7") + (() if torch.cuda.is_available() else ("cuda",)):
        error = refused(capsys, *arguments, "--device", name)
        assert error.startswith("pydistill: --device: expected auto or cpu")
        assert error.endswith(f"which torch has here, got {name!r}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_here_in_python(tmp_path):
    with pytest.raises(OptionError, match=r"device: expected auto or cpu.*, which torch has here, got 'cuda:99'"):
        run(DC.preset("digits", 1), out=tmp_path / "out", device="cuda:99")


@pytest.mark.parametrize("words", [d for d in DISTILLING if not d.endswith(("hello", "krr_st", "unip"))])
def test_a_precision_that_is_not_here(capsys, tmp_path, words):
    error = complaint(capsys, *words.split(), f"--out={tmp_path / 'out'}", "--precision=tf32", "--device=cpu")
    assert "precision: expected 'ieee' or 'bf16' on cpu, got 'tf32'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "option", "message"),
    [
        (
            "distill fedlgd",
            "--precision=bf16",
            "precision: expected a float32 one, in which all models train, got",
        ),
        ("squeeze", "--weights-key=ema", "--weights-key: expected with --weights only, got 'ema'"),
        *((f"recover --method {m}", "--crop=0", "crop: expected a share above 0 and at most 1") for m in DECOUPLED),
        ("recover", "--jitter=16385", "jitter: expected at most 16384 pixels, got 16385"),
        ("recover --method cda", "--milestone=0", "milestone: expected a share above 0 and at most 1, got 0.0"),
        *(("select dq", f"--lam={lam}", "lam: expected a finite number of at least 0, got") for lam in ("-1", "nan")),
    ],
)
def test_a_number_that_no_run_can_have(capsys, tmp_path, made, words, option, message):
    error = complaint(capsys, *command(words, made), option, f"--out={tmp_path / 'out'}")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_squeeze_without_momentum(tmp_path):
    out = tmp_path / "out"
    main(["squeeze", "--width=4", "--depth=2", "--image-size=8", "--epochs=1", "--momentum=0", f"--out={out}"])
    assert (out / "teacher.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recover --teacher --out OUT", "--teacher: expected the file of a squeezed network at least, got none"),
        ("relabel --images --out OUT", "Missing value for argument '--images'"),
        ("post-train --images --labels --out OUT", "Missing value for argument '--images'"),
        ("squeeze --dataset --out OUT", "Missing value for argument '--dataset'"),
        ("squeeze --method --out OUT", "Missing value for argument '--method'"),
        ("distill --ipc --out OUT", "Missing value for argument '--ipc'"),
        ("distill --resume --out --seed", "--resume: expected --out with the folder of the run to go on with"),
        ("distill --resume --out=", "--resume: expected --out with the folder of the run to go on with"),
        ("experts --out OUT --import", "--import: expected a replay buffer at least, got none"),
    ],
)
def test_an_option_without_its_value(capsys, tmp_path, arguments, message):
    found = complaint(capsys, *arguments.replace("OUT", str(tmp_path / "out")).split())
    assert message in found
    assert list(tmp_path.iterdir()) == []
