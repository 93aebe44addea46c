"""Methods run from Python: one contract, one run, whatever the method."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pydistill import methods
from pydistill.cli import main
from pydistill.methods import (
    DM,
    DQ,
    KRRST,
    METHODS,
    UNIP,
    HeLlO,
    Interrupted,
    OptionError,
    PostTrain,
    Relabel,
    Squeeze,
    SRe2L,
    run,
)
from pydistill.methods._moved import MOVED
from pydistill.methods.config import Config
from pydistill.methods.method import Inputs

TINY = {"width": 4, "depth": 2, "image_size": 8, "students": 1, "student_epochs": 1, "whole_epochs": 1}
TINY_UNIP = UNIP(teacher_width=8, teacher_depth=1, width=8, depth=1, teacher_epochs=3, epochs=3)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_keeps_the_contract(method):
    assert METHODS[method.name] is method
    assert method.about
    assert method.paper or method.name == "random"
    assert method.group in ("images", "decoupled", "selection", "networks")
    assert issubclass(method.inputs, Inputs)
    # an option is a hyper-parameter or an input, never both
    assert not {f.name for f in fields(method)} & {f.name for f in fields(method.inputs)}


def test_a_file_in_a_room_is_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(methods.matching, "__path__", [*methods.matching.__path__, str(tmp_path)])
    code = "from pydistill.methods.matching.dm import DM\nclass New(DM):\n    name = {!r}"
    (tmp_path / "new_method.py").write_text(code.format("new"))
    assert list(methods._all_methods())[: len(METHODS)] == list(METHODS)
    assert methods._all_methods()["new"].__name__ == "New"
    (tmp_path / "taken.py").write_text(code.format("dm"))
    with pytest.raises(ImportError, match=r"matching\.taken: expected a method with a name of its own, got 'dm' again"):
        methods._all_methods()
    for name in ("new_method", "taken"):
        del sys.modules[f"pydistill.methods.matching.{name}"]
        delattr(methods.matching, name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_data_set_without_presets_is_refused_and_has_the_defaults(method):
    ipc = {"ipc": 10} if issubclass(method, Config) else {}
    assert method.preset("digits", **ipc) == method.nearest_preset("digits", **ipc)
    with pytest.raises(ValueError, match=rf"preset: expected {method.name}'s for one of digits, .*, got 'svhn'"):
        method.preset("svhn", **ipc)
    assert method.nearest_preset("svhn", **ipc) == method(**ipc)


@pytest.mark.parametrize("method", [TINY_UNIP, HeLlO(ipc=1), KRRST(), Squeeze(), DM(ipc=1)], ids=lambda m: m.name)
def test_a_resumed_run_has_the_device_and_the_folder_of_data(tmp_path, method):
    """Where none are given; others may be given."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()

    class Stopped(type(method)):
        def job(self, inputs, device):
            seen.append((inputs.root, str(device), inputs.device))
            job = super().job(replace(inputs, root=None), device)
            job.phases = lambda: (lambda run: run.stop(),)
            return job

    seen, calls = [], iter(range(10))
    stopped = Stopped(**{f.name: getattr(method, f.name) for f in fields(method)})
    options = {"out": tmp_path / "run", "stop": lambda: next(calls) % 2 == 1}  # asked before and in the phase
    given = {"root": folder, "device": "cpu"}
    for resume, more in ((False, given), (True, {}), (True, {"root": elsewhere}), (True, {})):
        with pytest.raises(Interrupted):
            run(stopped, **options, resume=resume, **more)
    assert seen == [(folder, "cpu", "cpu")] * 2 + [(elsewhere, "cpu", "cpu")] * 2
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["root"], kept["device"]) == (str(elsewhere), "cpu")


def test_a_run_leaves_what_the_command_leaves(tmp_path):
    seen, lines = [], []
    results = run(DM(ipc=1, iterations=2), out=tmp_path / "run", on_progress=seen.append, tell=lines.append, **TINY)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"random", "distilled", "whole", "iterations"}
    left = {path.name for path in (tmp_path / "run").iterdir()}
    state = {"state.safetensors", "config.json", "metrics.jsonl", "results.json"}
    assert left == {"distilled.safetensors", "images.png"} | state
    assert [now.phase for now in seen if now.done == now.total][:2] == ["distil", "students on random"]
    assert lines[0] == f"digits -> {tmp_path / 'run'}"


def test_a_run_that_is_stopped_goes_on(tmp_path):
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    whole = run(TINY_UNIP, out=tmp_path / "whole")
    stops = iter([2, 4])
    options = {"resume": False}
    for lines in stops:  # within the teacher, and within the student
        with pytest.raises(Interrupted):
            run(
                TINY_UNIP,
                out=tmp_path / "stopped",
                stop=lambda lines=lines: metrics.exists() and len(metrics.read_text().splitlines()) >= lines,
                **options,
            )
        options["resume"] = True
    assert run(TINY_UNIP, out=tmp_path / "stopped", resume=True) == whole
    for name in ("student.safetensors", "metrics.jsonl", "results.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(OptionError, match=r"lr: expected 0.001 as the run in .* has, got 1.0"):
        run(UNIP(**{**vars(TINY_UNIP), "lr": 1.0}), out=tmp_path / "stopped", resume=True)


def test_the_decoupled_steps_follow_one_another(tmp_path):
    net = {"network": "convnet", "width": 4, "depth": 2}
    run(Squeeze(**net, epochs=1, lr=0.05), out=tmp_path / "teacher", image_size=8)
    teacher = str(tmp_path / "teacher" / "teacher.safetensors")
    found = run(SRe2L(ipc=1, iterations=2), out=tmp_path / "images", teacher=teacher)
    assert found == {"images": 10}
    images = tmp_path / "images" / "distilled.safetensors"
    run(Relabel(epochs=1), out=tmp_path / "labels", images=images, teacher=teacher)
    labels = tmp_path / "labels" / "labels.store"
    found = run(PostTrain(**net), out=tmp_path / "student", images=images, labels=labels, students=2)
    assert len(found["accuracy"]) == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"dataset": "svhn"}, "dataset: expected one of digits, "),
        ({"datset": "digits"}, "datset: expected an input of dm: "),
        ({"students": 0}, "students: expected at least 1, got 0"),
        ({"width": "4"}, "width: expected a whole number, got '4'"),
        ({"students": 1.5}, "students: expected a whole number, got 1.5"),
        ({"experts": "e.store"}, "experts: expected none: dm matches no trajectories, got e.store"),
    ],
)
def test_inputs_are_refused_by_name_before_anything_is_written(tmp_path, inputs, message):
    with pytest.raises(OptionError, match=message):
        run(DM(ipc=1), out=tmp_path / "run", **inputs)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_run_is_named(tmp_path):
    with pytest.raises(TypeError, match="method: expected hyper-parameters"):
        run(DM, out=tmp_path / "run")
    with pytest.raises(OptionError, match="resume: expected none, dq starts anew"):
        run(DQ(), out=tmp_path / "run", resume=True)
    with pytest.raises(OptionError, match="teacher: expected the file of a squeezed network at least, got none"):
        run(SRe2L(), out=tmp_path / "run", teacher=())
    with pytest.raises(OptionError, match="teacher: expected one for sre2l, got none"):
        run(SRe2L(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_as_the_same_run_alone(tmp_path):
    run(DM(ipc=1, iterations=1), out=tmp_path / "dm", **TINY)
    with pytest.raises(OptionError, match=r"width: expected 4 as the run in .* has, got 8"):
        run(DM(ipc=1, iterations=1), out=tmp_path / "dm", resume=True, **TINY | {"width": 8})
    with pytest.raises(OptionError, match=r"ipc: expected 1 as the run in .* has, got 999"):  # more than there are
        run(DM(ipc=999, iterations=1), out=tmp_path / "dm", resume=True, **TINY)
    with pytest.raises(OptionError, match=r"out: expected a run of squeeze to go on with, .* has one of dm"):
        run(Squeeze(), out=tmp_path / "dm", resume=True)


def test_hyper_parameters_that_do_not_fit_leave_nothing(tmp_path):
    with pytest.raises(OptionError, match="ipc: expected at most"):
        run(HeLlO(ipc=5000), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", MOVED)
def test_modules_that_moved_are_found_under_their_old_names(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is {MOVED[name]} now"):
        old = importlib.import_module(name)
    new = importlib.import_module(MOVED[name])
    assert all(getattr(old, each) is getattr(new, each) for each in vars(new) if not each.startswith("__"))


# Runs that version 0.1 left when it was stopped, and the options for resuming them.
OLD_RUNS = {
    "dm": "distill --out {out}",
    "mtt": "distill --out {out}",
    "unip": "distill unip --teacher-width 8 --teacher-depth 1 --width 8 --depth 1 --teacher-epochs 1 --epochs 2 "
    "--image-size 8 --heads 2 --out {out}",
    "krr_st": "distill krr_st --width 4 --depth 2 --image-size 8 --target-epochs 1 --images 10 --iterations 4 --pool 1 "
    "--online-steps 2 --pretrain-steps 1 --students 1 --out {out}",
    "hello": "distill hello --encoder-epochs 1 --encoder-width 4 --image-size 8 --teachers 1 --teacher-epochs 1 "
    "--fit-epochs 1 --ipc 1 --student-epochs 1 --students 1 --image-steps 1 --out {out}",
    "squeeze": "squeeze --network convnet --width 4 --depth 2 --image-size 8 --epochs 2 --out {out}",
    "recover": "recover --teacher {teacher} --ipc 1 --iterations 4 --checkpoint-every 1 --batch-size 5 --out {out}",
}


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_of_an_earlier_version_goes_on(name, tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "files" / "runs_v0.1.zip") as archive:
        archive.extractall(tmp_path)
    folder, metrics = tmp_path / name, tmp_path / name / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else ""
    places = {"out": folder, "teacher": tmp_path / "teacher" / "teacher.safetensors"}
    main([*(word.format(**places) for word in OLD_RUNS[name].split()), "--resume"])
    assert (folder / "results.json").exists()
    # finished steps are not repeated
    assert metrics.read_text().startswith(before)


def test_the_progress_of_recovery_ends_at_its_total(tmp_path):
    run(Squeeze(network="convnet", width=4, depth=2, epochs=1, lr=0.05), out=tmp_path / "teacher", image_size=8)
    seen, teacher = [], tmp_path / "teacher" / "teacher.safetensors"
    options = {"teacher": teacher, "checkpoint_every": 2, "on_progress": seen.append}
    run(SRe2L(ipc=1, iterations=5), out=tmp_path / "images", **options)
    assert [now.done for now in seen] == [0, 2, 4, 5]
    assert seen[-1].total == 5
