"""Options that no run can have are refused in one line, before a folder is made, in every command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    """The line that a command says before it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pydistill: ")
    assert error.count("\n") == 1
    return error


def test_choices_are_named_in_one_order(capsys):
    found = complaint(capsys, "experts", "--norm=x")
    assert "--norm: expected one of batch, group, instance, layer, none, got 'x'" in found, found


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
        ("squeeze", "--weights-key=ema", "--weights-key: expected with --weights FILE only, got 'ema'"),
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
    ("words", "options", "message"),
    [
        *((d, "--experts=x", f"--experts: expected none: {d.split()[1]} matches no trajectories, got x")
          for d in DISTILLING if "experts" in METHODS[d.split()[1]].inputs.__dataclass_fields__
          and not METHODS[d.split()[1]].needs_experts),
        ("distill dm", "--train-epochs=50", "--train-epochs: expected none: dm matches no trajectories, got 50"),
        ("distill dc", "--batch-train=8 --whole-epochs=0", "--batch-train: expected none with --whole-epochs 0, got 8"),
        ("distill mtt", "--lr-expert=1 --experts=x", "--lr-expert: expected none with --experts FILE, whose file says"),
        ("distill fedlgd", "--split=class --alpha=1", "--alpha: expected none with --split class, got 1.0"),
        ("distill unip", "--layer=1 --target-nmi=0.1", "--target-nmi: expected none with --layer 1, got 0.1"),
        ("squeeze", "--network=resnet18 --depth=3", "--depth: expected none with --network resnet18, got 3"),
        ("squeeze", "--weights=x --epochs=1", "--epochs: expected none with --weights FILE, which is not trained,"),
        ("squeeze", "--dataset=cifar10 --image-size=8", "--image-size: expected none: cifar10 has a size of its own"),
        ("recover", "--root=x", "--root: expected none: sre2l starts from noise, got x"),
        ("recover --method random", "--lr=1", "--lr: expected none: real images are taken as they are, got 1.0"),
        ("relabel", "--k=3", "--k: expected none with --format fp16, got 3"),
        ("relabel", "--mix=none --alpha=1", "--alpha: expected none with --mix none, got 1.0"),
        ("post-train", "--network=resnet18 --depth=3", "--depth: expected none with --network resnet18, got 3"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(capsys, tmp_path, made, words, options, message):
    assert message in refused(capsys, *command(words, made), *options.split(), "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_option_without_effect_in_python(tmp_path):
    with pytest.raises(OptionError, match="experts: expected none: dc matches no trajectories, got x"):
        run(DC.preset("digits", 1), out=tmp_path / "out", experts="x")


def test_what_the_environment_asks_for_is_refused_in_a_line():
    environment = os.environ | {"PYDISTILL_ISA": "sse9"}
    for module, arguments in (("pydistill.cli", ["distill"]), ("pydistill.cli", ["--help"]), ("pydistill.info", [])):
        program = [sys.executable, "-m", module, *arguments]
        found = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=100)
        assert found.returncode == (2 if module == "pydistill.cli" else 1)
        said = f"{module.removesuffix('.cli')}: PYDISTILL_ISA=sse9: expected base, avx2, avx512, avx512_bf16 or amx\n"
        assert (found.stdout, found.stderr) == ("", said)


@pytest.mark.parametrize("step", ["squeeze", *NEEDS])
def test_a_step_goes_on_with_the_options_of_its_run(capsys, tmp_path, made, step):
    small = {"squeeze": ("--width=4", "--depth=2", "--image-size=8", "--epochs=1")}
    small |= {"recover": ("--ipc=2", "--iterations=1"), "relabel": ("--epochs=1", "--mix=none")}
    small |= {"post-train": ("--width=4", "--depth=1", "--hard")}
    out = tmp_path / "out"
    main([*command(step, made), *small[step], f"--out={out}"])
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    main([step, f"--out={out}", "--resume"])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == kept
    changed, before, now = {
        "squeeze": ("--width", 4, 8), "recover": ("--ipc", 2, 3), "relabel": ("--epochs", 1, 2),
        "post-train": ("--depth", 1, 2),
    }[step]  # fmt: skip
    error = refused(capsys, step, f"--out={out}", "--resume", changed, now)
    assert error == f"pydistill: {changed}: expected {before} as the run in {out} has, got {now}\n"
    other = "squeeze" if step != "squeeze" else "relabel"
    assert f"--out: expected a run of {other} to go on with" in refused(capsys, other, f"--out={out}", "--resume")
    assert "distill: expected " in refused(capsys, "distill", f"--out={out}", "--resume")


def test_a_run_goes_on_with_its_files(capsys, tmp_path, made):
    """Which may have been moved, but not be others."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for path in (first, second):
        shutil.copy(made["teacher"].removeprefix("--teacher="), path)
    out = tmp_path / "out"
    main(["recover", f"--teacher={first}", "--ipc=1", "--iterations=1", f"--out={out}"])
    error = refused(capsys, "recover", f"--out={out}", "--resume", f"--teacher={second}")
    assert f"--teacher: expected ['{first}'] as the run in {out} has, got ['{second}']" in error
    error = refused(capsys, "recover", f"--out={out}", "--resume", "--method=cda")
    assert f"--method: expected sre2l as the run in {out} has, got cda" in error
    first.unlink()
    assert f"{first}: expected a pydistill file" in refused(capsys, "recover", f"--out={out}", "--resume")
    main(["recover", f"--out={out}", "--resume", f"--teacher={second}"])


def test_several_networks_where_one_is_used(capsys, tmp_path, made):
    teacher = made["teacher"].removeprefix("--teacher=")
    error = refused(capsys, "recover", "--teacher", teacher, teacher, f"--out={tmp_path / 'out'}")
    assert error == "pydistill: --teacher: expected one for sre2l, got 2\n"


def test_images_are_counted(capsys, tmp_path, made):
    main(["recover", made["teacher"], "--ipc=2", "--iterations=1", f"--out={tmp_path / 'out'}"])
    assert "images 20; " in capsys.readouterr().out


def test_the_folder_of_a_run_instead_of_its_file(capsys, tmp_path, made):
    folders = {name: Path(option.split("=")[1]).parent for name, option in made.items()}
    main(["evaluate", str(folders["images"]), "--students=1", "--epochs=1", "--width=4", "--depth=1"])
    main(["export", str(folders["images"]), str(tmp_path / "exported")])
    (tmp_path / "file").touch()
    assert "file: expected a folder, it is a file" in refused(capsys, "export", folders["images"], tmp_path / "file")
    error = refused(capsys, "evaluate", folders["teacher"])
    assert "expected a folder of distilled.safetensors, or images.pt and labels.pt, found neither" in error
    for words, option, file in (
        ("recover", "teacher", "teacher.safetensors"),
        ("relabel", "images", "distilled.safetensors"),
        ("post-train", "labels", "labels.store"),
    ):
        folder = folders[option]
        error = refused(capsys, *command(words, made), f"--{option}={folder}", f"--out={tmp_path / 'out'}")
        assert error.endswith(f"found a folder; did you mean {folder / file}?\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recover --teacher --out OUT", "--teacher: expected the file of a squeezed network at least, got none"),
        ("relabel --images --out OUT", "--images: expected a value, got none"),
        ("post-train --images --labels --out OUT", "--images: expected a value, got none"),
        ("squeeze --dataset --out OUT", "--dataset: expected a value, got none"),
        ("squeeze --method --out OUT", "--method: expected a value, got none"),
        ("distill --ipc --out OUT", "--ipc: expected a value, got none"),
        ("distill --resume --out --seed", "--out: expected the folder of the run to go on with"),
        ("distill --resume --out=", "--out: expected the folder of the run to go on with, got none"),
        ("distill --resume --seed 3", "--resume: expected --out with the folder of the run to go on with"),
        ("experts --out OUT --import", "--import: expected a replay buffer at least, got none"),
    ],
)
def test_an_option_without_its_value(capsys, tmp_path, arguments, message):
    found = complaint(capsys, *arguments.replace("OUT", str(tmp_path / "out")).split())
    assert message in found
    assert list(tmp_path.iterdir()) == []
