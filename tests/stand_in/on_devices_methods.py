"""Every method for two iterations on a device, from Python and from the command line, against the CPU.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pydistill.cli import main
from pydistill.data import Dataset
from pydistill.methods import (
    CDA,
    DWA,
    INFER,
    METHODS,
    FedLGD,
    Method,
    PostTrain,
    Relabel,
    Squeeze,
    SRe2L,
    distill,
    run,
)
from pydistill.methods.decoupled.recover import merge, recover
from pydistill.methods.decoupled.squeeze import squeeze, untrained
from pydistill.methods.runs import Interrupted
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import release_graphs
from tests.bars import make_net
from tests.matrices import sample
from tests.methods.test_methods import CONFIGS as DISTILLING
from tests.stand_in.precisions import CONV, IEEE, MATMUL, Precisions, switched_to

CONFIGS = {name: replace(config, iterations=2) for name, config in DISTILLING.items()}
CONFIGS["fedlgd"] = FedLGD(
    ipc=1, iterations=2, clients=2, local_steps=2, batch_real=8, train_steps=2, server_steps=2, seed=5
)


def on(device: str, dataset: Dataset) -> Dataset:
    return dataset.to(torch.device(device))


@pytest.mark.parametrize("name", sample(CONFIGS, ["mtt", "dc", "datadam", "tesla", "fedlgd", "rat_bptt"]))
def test_distilled_images_are_those_of_the_cpu(
    name: str, dataset: Dataset, experts: Tensor, request: pytest.FixtureRequest
) -> None:
    found = [distill(CONFIGS[name], on(device, dataset), make_net(), experts) for device in ("cpu", "cuda:0")]
    start = CONFIGS[name].initial(dataset, make_net(), CONFIGS[name].check(dataset, make_net(), experts))["images"]
    assert not torch.equal(found[0].images, start)
    for part in ("images", "labels"):
        here, there = (getattr(each, part) for each in found)
        torch.testing.assert_close(
            there, here, rtol=1e-3, atol=1e-3 * (here.float() - here.float().mean()).std().item()
        )


TINY = {"width": 4, "depth": 2, "image_size": 8, "students": 1, "student_epochs": 1, "whole_epochs": 1}
EXPERTS = {"num_experts": 1, "train_epochs": 2}
PICKED = {"width": 4, "depth": 2, "image_size": 8, "students": 1, "student_epochs": 1}
NET = {"network": "convnet", "width": 4, "depth": 2}

# hyper-parameters and inputs, for two iterations
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"ipc": 1, "iterations": 2, "syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 1}, TINY | EXPERTS)
        for name in ("mtt", "tesla", "ftd", "ast", "fyi")
    },
    "datm": (
        {"ipc": 1, "iterations": 2, "syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 1, "threshold": 5.0}
        | {"first_max_start_epoch": 1, "expansion": 1},
        TINY | EXPERTS,
    ),
    "rat_bptt": ({"ipc": 1, "iterations": 2, "window": 2, "total": 3, "batch_real": 20}, TINY),
    **{
        name: ({"ipc": 1, "iterations": 2, "batch_real": 4}, TINY)
        for name in ("dc", "dsa", "dm", "datadam", "atom", "fyi_dm", "fyi_dsa")
    },
    "fedlgd": ({**vars(CONFIGS["fedlgd"])}, TINY),
    "krr_st": (
        {"images": 10, "iterations": 2, "batch_real": 8, "pool": 1, "online_steps": 2, "width": 4, "depth": 2}
        | {"target_epochs": 1, "pretrain_steps": 1, "students": 1},
        {"image_size": 8},
    ),
    "hello": (
        {"encoder_epochs": 1, "encoder_width": 4, "teachers": 1, "teacher_epochs": 1, "fit_epochs": 1, "ipc": 1}
        | {"student_epochs": 1, "students": 1, "image_steps": 1},
        {"image_size": 8},
    ),
    **{name: ({"teacher_epochs": 1}, PICKED) for name in ("dq", "pca")},
    "unip": (
        {"teacher_width": 8, "teacher_depth": 1, "width": 8, "depth": 1, "teacher_epochs": 1, "epochs": 1, "heads": 2},
        {"image_size": 8},
    ),
}
PIPELINE = ("squeeze", "sre2l", "cda", "dwa", "infer", "random", "relabel", "post-train")
FIRST = ["dm", "mtt", "datadam", "dc", "unip"]


def test_all_methods_are_run() -> None:
    assert {*RUNS, *PIPELINE} == set(METHODS)


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_files(there: Path, here: Path, values: bool = True) -> None:
    found, wanted = files(there), files(here)
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[name][key].shape == tensor.shape
            assert found[name][key].isfinite().all() or not tensor.isfinite().all()
            if not values:
                continue
            spread = tensor.float().std().nan_to_num().item() if tensor.numel() > 1 else 1.0
            torch.testing.assert_close(found[name][key], tensor, rtol=2e-2, atol=2e-2 * spread + 1e-5, equal_nan=True)


# images are picked by what a trained network says of them, and rounding changes ranks
PICKING = ("hello",)


@pytest.mark.parametrize("name", sample(RUNS, FIRST))
def test_runs(name: str, tmp_path: Path) -> None:
    method, inputs = RUNS[name]
    for device in ("cpu", "cuda"):
        run(METHODS[name](**method), out=tmp_path / device, device=device, **inputs)
    assert_same_files(tmp_path / "cuda", tmp_path / "cpu", values=name not in PICKING)


DECOUPLED = (SRe2L, CDA, DWA, INFER)


def steps(
    device: str,
    out: Path,
    precision: str = "auto",
    methods: Sequence[type] = DECOUPLED,
    run: Callable[..., dict[str, Any]] = run,
) -> dict[str, Any]:
    """All steps of the decoupled methods, of two iterations or epochs."""
    how: dict[str, Any] = {"precision": precision}
    run(Squeeze(**NET, epochs=2, lr=0.05, **how), out=out / "teacher", image_size=8, device=device)
    teacher = out / "teacher" / "teacher.safetensors"
    for method in methods:
        given = {"teacher": teacher, "device": device, "checkpoint_every": 1}
        run(method(ipc=2, iterations=2, batch_size=10, **how), out=out / method.name, **given)
    images = out / "sre2l" / "distilled.safetensors"
    run(Relabel(epochs=2, **how), out=out / "labels", images=images, teacher=teacher, device=device)
    labels = out / "labels" / "labels.store"
    return run(PostTrain(**NET, **how), out=out / "student", images=images, labels=labels, device=device)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=pytest.mark.exhaustive)])
def test_the_decoupled_steps(device: str, tmp_path: Path) -> None:
    for each in ("cpu", device):
        assert len(steps(each, tmp_path / each)["accuracy"]) == 1
    for folder in ("teacher", "sre2l", "cda", "dwa", "infer"):
        assert_same_files(tmp_path / device / folder, tmp_path / "cpu" / folder)


@pytest.mark.parametrize("name", ["mtt", "rat_bptt", "dm"])
def test_a_run_keeps_what_it_decided_when_it_began(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_allocated", torch.cuda.memory_reserved)  # torch holds none
    method, inputs = RUNS[name]
    given, metrics = {"out": tmp_path, "device": "cuda", **inputs}, tmp_path / "metrics.jsonl"
    begun = lambda: metrics.exists() and '"distill"' in metrics.read_text()  # noqa: E731
    with switched_to(*CONV), pytest.raises(Interrupted):
        run(METHODS[name](**method), stop=begun, **given)
    free = 1 << 40
    release_graphs()
    with switched_to(*MATMUL), Precisions(monkeypatch) as found:
        run(METHODS[name](**method), resume=True, **given)
    assert found.seen == {CONV}
    assert json.loads((tmp_path / "config.json").read_text())["config"]["precision"] == "tf32-conv"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [line.get("kept_steps") for line in lines if line["phase"] == "distill"]
    assert kept == ([None] * 2 if name == "dm" else [0] * 2)
    with pytest.raises(ValueError, match=r"precision: expected tf32-conv as the run in .* has, got ieee"):
        run(METHODS[name](**method, precision="ieee"), resume=True, **given)


def test_the_decoupled_steps_keep_what_torch_said_when_they_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is begun on the CPU, where nothing is to be decided, is float32 without TF32 on a GPU."""
    begin_on, wanted, kept = "cuda", CONV, "tf32-conv"

    def begun_and_resumed(method: Method, *, device: str, **options: Any) -> dict[str, Any]:
        asked = iter([False] + 99 * [True])
        with switched_to(*CONV), pytest.raises(Interrupted):
            run(method, stop=lambda: next(asked), device=begin_on, **options)
        with switched_to(*MATMUL), Precisions(monkeypatch) as found:
            results = run(method, resume=True, device=device, **options)
        assert found.seen == {wanted}
        now = json.loads((options["out"] / "config.json").read_text())
        assert now.get("config", now)["precision"] == kept
        with pytest.raises(ValueError, match=f"precision: expected {kept} as the run in .* has, got tf32-matmul"):
            run(replace(method, precision="tf32-matmul"), resume=True, device=device, **options)
        return results

    steps("cuda", tmp_path / "gpu", methods=(SRe2L, DWA), run=begun_and_resumed)
    begin_on, wanted, kept = "cpu", IEEE, "ieee"
    steps("cuda", tmp_path / "moved", methods=(SRe2L, DWA), run=begun_and_resumed)


@pytest.mark.parametrize("precision", ["bf16", "fp16", pytest.param("tf32", marks=pytest.mark.exhaustive)])
def test_precisions_are_near_and_go_on_bit_for_bit(precision: str, tmp_path: Path) -> None:
    methods = (SRe2L, DWA, INFER)
    for out, given in (("plain", "auto"), ("whole", precision)):
        steps("cuda", tmp_path / out, given, methods)
    found, wanted = (load_file(tmp_path / out / "teacher" / "teacher.safetensors") for out in ("whole", "plain"))
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        if tensor.dim() > 1:
            assert (found[name] - tensor).norm() < 2**-5 * tensor.norm(), name

    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 1

    def cut_off(method: Method, **options: Any) -> dict[str, Any]:
        nonlocal calls
        calls = 0
        with pytest.raises(Interrupted):
            run(method, stop=stop, **options)
        return run(method, resume=True, **options)

    steps("cuda", tmp_path / "cut", precision, methods, cut_off)
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert (tmp_path / "cut/labels/labels.store").read_bytes() == (tmp_path / "whole/labels/labels.store").read_bytes()


def test_a_scale_at_which_gradients_overflow_is_halved_and_kept(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: scaler(*args, init_scale=2.0**40, **options))
    config, kept = Squeeze(**NET, epochs=12, batch_size=15, precision="fp16"), []
    data, start = on("cuda", dataset), untrained(config, dataset).net

    def keep(record: dict[str, Any], state: dict[str, Tensor]) -> None:
        kept.append({name: value.clone() for name, value in state.items()})

    trained = squeeze(config, data, on_epoch=keep)
    assert len(dataset.train_images) == 45
    assert kept[0]["scaler.scale"] == 2.0**37
    for name, parameter in start.named_parameters():
        assert torch.equal(kept[0][f"net.{name}"].cpu(), parameter)  # no step was taken
        assert not torch.equal(kept[-1][f"net.{name}"].cpu(), parameter)
    again = squeeze(config, data, state=kept[2])
    for one, other in zip(trained.net.state_dict().values(), again.net.state_dict().values(), strict=True):
        assert torch.equal(one, other)

    def stop(record: dict[str, Any]) -> None:
        if record["iteration"] == 9:
            raise KeyboardInterrupt

    recovery, found = SRe2L(ipc=1, iterations=40, jitter=1, precision="fp16"), []
    for folder in ("whole", "cut"):
        if folder == "cut":
            with pytest.raises(KeyboardInterrupt):
                recover(recovery, [trained], tmp_path / folder, checkpoint_every=3, on_step=stop)
        recover(recovery, [trained], tmp_path / folder)
        found.append(merge(recovery, [trained], tmp_path / folder).images)
    assert torch.equal(*found)
    noise = torch.randn(found[0].shape, generator=seeded_generator(0, Stream.NOISE_START, 0))
    assert (found[0] - noise.clamp(*trained.bounds())).abs().max() > 0.1  # steps were taken in the end


def command(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


def test_the_command_line(tmp_path: Path) -> None:
    net = ("--width", 4, "--depth", 2, "--image-size", 8)
    small = ("--iterations", 2, "--students", 1, "--student-epochs", 1, "--whole-epochs", 1, "--batch-real", 4)
    command("distill", "dm", *net, *small, "--device", "cuda", "--out", tmp_path / "dm")
    found = json.loads((tmp_path / "dm" / "results.json").read_text())
    assert found.keys() == {"random", "distilled", "whole", "iterations"}
    command("evaluate", tmp_path / "dm" / "distilled.safetensors", "--students", 1, "--device", "cuda")
