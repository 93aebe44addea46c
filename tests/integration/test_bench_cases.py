"""The benchmarks of operators, stores and matching at tiny sizes: green, and red where a provider is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import label_error, ours, run
from bench.case import Entry
from bench.peers import (
    distribution,
    gradient_matching,
    label_losses,
    recover,
    resnet,
    segments,
    selection,
    stored_labels,
)
from bench.registry import CASES
from pydistill import matching
from tests.integration.results import rows_in

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.exhaustive]


def test_datadam_as_published_is_green(tmp_path: Path) -> None:
    name = "datadam_step_published"
    assert run.main([name, "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0


def test_block_is_green(tmp_path: Path) -> None:
    name = "instance_norm_relu_avg_pool"
    assert run.main([name, "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / f"{name}.csv")
    assert {(row["mode"].count("+"), row["x_value"]) for row in rows} == {
        (derivatives, layout) for derivatives in range(3) for layout in ("nchw", "channels_last")
    }


def test_augment_is_green(tmp_path: Path) -> None:
    assert run.main(["augment", "--quick", "--providers", "eager-batched,pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "augment.csv")
    assert {row["provider"] for row in rows} == {"eager", "eager-batched", "pydistill"}
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}


def test_multi_crop_is_green(tmp_path: Path) -> None:
    assert run.main(["multi_crop", "--quick", "--providers", "products,pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "multi_crop.csv")
    assert {row["provider"] for row in rows} == {"eager", "products", "pydistill"}
    assert {(row["mode"], row["x_value"]) for row in rows} == {
        (mode, crops) for mode in ("forward", "forward+backward") for crops in ("each", "shared")
    }


def test_attention_map_divergence_is_green(tmp_path: Path) -> None:
    name = "attention_map_divergence"
    assert run.main([name, "--quick", "--providers", "eager-once,pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / f"{name}.csv")
    assert {(row["provider"], row["x_value"]) for row in rows} == {
        (provider, "17") for provider in ("eager", "eager-once", "pydistill")
    }


def test_attention_map_divergence_holds_no_map(tmp_path: Path) -> None:
    name = "attention_map_divergence_memory"
    assert run.main([name, "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    peaks = {row["provider"]: float(row["median"]) for row in rows_in(tmp_path / f"{name}.csv") if row["unit"] == "MiB"}
    assert peaks["eager"] > 3 * peaks["pydistill"] > 0


def test_graph_cut_greedy_is_green(tmp_path: Path) -> None:
    assert run.main(["graph_cut_greedy", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "graph_cut_greedy.csv")
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in ("loop", "rows", "pydistill") for mode in ("features", "gradients")
    }


def test_graph_cut_gate_sees_one_other_pick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(problem: selection.Samples) -> selection.Thunk:
        return lambda: selection.loop(problem)().flip(0) if problem.factors is not None else selection.loop(problem)()

    case = CASES["graph_cut_greedy"]
    case = replace(case, providers={"loop": case.providers["loop"], "pydistill": Entry(wrong)})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert "MISSED: pydistill, float64, picks that are not the loop's" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_gradient_matching_step_is_green(tmp_path: Path) -> None:
    providers = "pydistill,pydistill-bf16"
    assert run.main(["gradient_matching_step", "--quick", "--providers", providers, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "gradient_matching_step.csv")
    assert {(row["provider"], row["x_value"]) for row in rows} == {
        (name, "2") for name in ("eager", *providers.split(","))
    }


def test_gradient_matching_step_sees_a_wrong_image_gradient(tmp_path: Path) -> None:
    def scaled(problem: gradient_matching.Matching) -> gradient_matching.Thunk:
        """Off by one in a million."""
        right = gradient_matching.prepare_eager(problem)

        def wrong() -> gradient_matching.Matched:
            loss, d_images = right()
            return gradient_matching.Matched(loss, d_images * 1.000001)

        return wrong

    case = CASES["gradient_matching_step"].only([])
    case = replace(case, providers=case.providers | {"wrong": Entry(scaled)})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_gradient_matching_step_must_beat_eager_and_the_best_compiled_step() -> None:
    seconds = {"eager": 9.0, "compiled": 3.0, "compiled-vmap": 4.0, "pydistill": 2.0}
    case = CASES["gradient_matching_step"]
    for changed, expected in (({}, [True, True]), ({"compiled": 2.5}, [True, False]), ({"eager": 6.9}, [False, True])):
        medians = {("", 10, name): value for name, value in (seconds | changed).items()}
        assert [check.ok for check in case.must_show(medians, case.full)] == expected


def test_expert_store_is_green(tmp_path: Path) -> None:
    assert run.main(["expert_store", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "expert_store.csv")
    assert {(row["mode"], row["x_value"], row["provider"]) for row in rows} == {
        ("open", "5", "pydistill"),
        *(("random segment", "3", provider) for provider in ("torch.load", "torch.load-mmap", "pydistill")),
    }


def test_expert_store_sees_the_wrong_rows(tmp_path: Path) -> None:
    def backwards(problem: segments.Experts) -> segments.Thunk:
        right = segments.prepare_load(problem)
        return lambda: segments.Segment(*reversed(right()))

    case = replace(CASES["expert_store"], providers=CASES["expert_store"].providers | {"wrong": Entry(backwards)})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_expert_store_must_be_fifty_times_as_fast() -> None:
    case = CASES["expert_store"]
    for load, opening, expected in (
        (100.0, 1.0, [True, True]),
        (98.0, 1.0, [False, True]),
        (100.0, 11.0, [True, False]),
    ):
        medians = {("random segment", 10, "torch.load"): load, ("random segment", 10, "pydistill"): 2.0}
        medians["open", 100, "pydistill"] = opening
        assert [check.ok for check in case.must_show(medians, case.full)] == expected


def test_soft_label_read_is_green(tmp_path: Path) -> None:
    providers = ["pydistill-fp16", "pydistill-logits8", "pydistill-topk", "pydistill-topk8"]
    assert run.main(["soft_label_read", "--quick", "--providers", ",".join(providers), "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "soft_label_read.csv")
    assert {(row["mode"], row["provider"]) for row in rows} == {
        (mode, name) for mode in ("no worker", "one worker") for name in ("torch.load", *providers)
    }


def test_soft_label_bytes_are_counted(tmp_path: Path) -> None:
    assert run.main(["soft_label_bytes", "--quick", "--out", str(tmp_path)]) == 0
    rows = [row for row in rows_in(tmp_path / "soft_label_bytes.csv") if row["unit"] == "B"]
    found = {(row["mode"], row["provider"]): float(row["median"]) for row in rows}
    assert {name for mode, name in found if mode == "labels and records"} == set(CASES["soft_label_bytes"].providers)
    assert found["labels and records", "topk8"] >= 58 + 34
    assert found["labels", "logits8"] < found["labels", "fp16"]


def test_label_errors_are_those_of_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CLASSES": 40, "ROWS": 8, "BATCH": 4, "KEPT": (1, 40)}.items():
        monkeypatch.setattr(label_error, name, value)
    monkeypatch.setattr("sys.argv", ["label_error", "--results", str(tmp_path)])
    label_error.main()
    rows = rows_in(tmp_path / "soft_label_error.csv")
    found = {(row["format"], int(row["k"]), int(row["T"])): float(row["near"]) for row in rows}
    assert len(found) == len(rows) == (5 + 2 * 2) * 3
    for T in label_error.TEMPERATURES:
        assert found["fp32", 0, T] == 0 < found["fp16", 0, T] < found["logits8", 0, T] < found["topk", 1, T]
    assert {row["bytes"] for row in rows if row["format"] == "logits8"} == {"48"}
    assert (tmp_path / "soft_label_error.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["soft_label_read", "soft_label_bytes"])
def test_stored_labels_see_a_loss_that_is_off(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two millionths; the gates of both cases ask the store through the same provider."""
    right = ours.stored_labels_epoch

    def wrong(problem: stored_labels.Labels, form: str = "topk8") -> stored_labels.Thunk:
        epoch = right(problem, form)

        def run() -> stored_labels.Trained:
            losses, d_logits = epoch()
            return stored_labels.Trained([loss * (1 + 2e-6) + 2e-6 for loss in losses], d_logits)

        return run

    monkeypatch.setattr(ours, "stored_labels_epoch", wrong)
    case = CASES[name].only([])
    case = replace(case, providers=case.providers | {"topk8": Entry(wrong, "topk8")})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_stored_labels_must_be_small_and_fast() -> None:
    case = CASES["soft_label_read"]
    for changed, expected in (
        ({}, [True, True]),
        ({"no worker": 4.9}, [False, True]),
        ({"one worker": 4.9}, [True, False]),
    ):
        medians = {}
        for mode in ("no worker", "one worker"):
            medians[mode, 1024, "torch.load"] = changed.get(mode, 5.1)
            medians[mode, 1024, "pydistill-topk8"] = 1.0
        assert [check.ok for check in case.must_show(medians, case.full)] == expected
    case = CASES["soft_label_bytes"]
    medians = {("labels", 10, "topk"): 50.1, ("labels", 10, "topk8"): 49.9, ("labels and records", 10, "topk8"): 99.0}
    assert [check.ok for check in case.must_show(medians, case.full)] == [False, True]


STEPS = {"datadam_step": distribution.eager_datadam, "dm_step": distribution.eager_dm}


@pytest.mark.parametrize("name", STEPS)
def test_distribution_steps_are_green(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled peers by what they compile: compiling takes longer than this file may."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    providers = ["compiled", "compiled-group-norm", "pydistill", *(["pydistill-bf16"] if "datadam" in name else [])]
    assert run.main([name, "--quick", "--providers", ",".join(providers), "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / f"{name}.csv")
    assert {row["provider"] for row in rows} == {"eager", *providers}


@pytest.mark.parametrize("name", STEPS)
def test_distribution_steps_see_a_missing_class_and_a_half_gradient(name: str, tmp_path: Path) -> None:
    def first_classes(problem: distribution.Images) -> distribution.Thunk:
        few = problem.classes - 1
        sizes = [len(images) * few // problem.classes for images in (problem.real, problem.synthetic)]
        real, synthetic = problem.real[: sizes[0]], problem.synthetic[: sizes[1]]
        thunk = STEPS[name](replace(problem, real=real, synthetic=synthetic, classes=few))

        def run() -> distribution.Matched:
            loss, d_images = thunk()
            return distribution.Matched(loss, torch.cat([d_images, torch.zeros_like(problem.synthetic[sizes[1] :])]))

        return run

    def halved(problem: distribution.Images) -> distribution.Thunk:
        thunk = STEPS[name](problem)
        return lambda: distribution.Matched(thunk().loss, thunk().d_images / 2)

    for wrong in (first_classes, halved):
        case = CASES[name].only([])
        case = replace(case, providers=case.providers | {"wrong": Entry(wrong)})
        assert run.run_case(case, size="quick", out=tmp_path) == 1
        assert not list(tmp_path.iterdir())


def test_datadam_in_bf16_is_held_to_a_cosine(tmp_path: Path) -> None:
    """Neither a gradient along another class nor a loss that is a tenth off is let through."""

    def turned(problem: distribution.Images) -> distribution.Thunk:
        thunk = distribution.eager_datadam(problem)
        return lambda: distribution.Matched(thunk().loss, thunk().d_images.roll(1, 0))

    def larger(problem: distribution.Images) -> distribution.Thunk:
        thunk = distribution.eager_datadam(problem)
        return lambda: distribution.Matched(thunk().loss * 1.1, thunk().d_images)

    for prepare, status in ((distribution.eager_datadam, 0), (turned, 1), (larger, 1)):
        case = CASES["datadam_step"].only([])
        case = replace(case, providers=case.providers | {"half": Entry(prepare, precision="bf16")})
        assert run.run_case(case, size="quick", out=tmp_path) == status


def test_distribution_steps_must_beat_the_better_compiled_form() -> None:
    seconds = {"eager": 12.0, "compiled": 3.0, "compiled-group-norm": 3.6, "compiled-bf16": 1.3}
    seconds |= {"pydistill": 1.9, "pydistill-bf16": 1.0}
    case = CASES["datadam_step"]
    for changed, expected in (
        ({}, [True] * 5),
        ({"eager": 9.0}, [False, True, False, True, True]),
        ({"compiled-group-norm": 2.3}, [True, False, True, False, True]),
        ({"compiled-bf16": 1.1}, [True, True, True, True, False]),
    ):
        medians = {("", 128, name): value for name, value in (seconds | changed).items()}
        assert [check.ok for check in case.must_show(medians, case.full)] == expected


def test_mmd_is_green(tmp_path: Path) -> None:
    assert run.main(["mmd", "--quick", "--providers", "cdist,pydistill", "--out", str(tmp_path)]) == 0
    assert {row["provider"] for row in rows_in(tmp_path / "mmd.csv")} == {"cube", "cdist", "pydistill"}


def test_mmd_memory_is_measured_in_subprocesses(tmp_path: Path) -> None:
    assert run.main(["mmd_memory", "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    peaks = {
        row["provider"]: float(row["median"]) for row in rows_in(tmp_path / "mmd_memory.csv") if row["unit"] == "MiB"
    }
    assert peaks["cube"] > 10 * peaks["pydistill"] > 0


def test_mmd_sees_other_kernels(tmp_path: Path) -> None:
    def four(problem: distribution.Rows) -> Callable[[], distribution.Discrepancy]:
        return distribution.autograd_mmd(problem, lambda x, y: matching.mmd(x, y, kernels=4))

    case = CASES["mmd"].only([])
    assert (
        run.run_case(replace(case, providers=case.providers | {"wrong": Entry(four)}), size="quick", out=tmp_path) == 1
    )


def test_mmd_must_beat_the_cube_and_the_better_compiled_form() -> None:
    case, seconds = CASES["mmd"], {"cube": 9.0, "compiled": 2.0, "compiled-cdist": 1.4, "pydistill": 1.0}
    for changed, expected in (
        ({}, [True, True]),
        ({"cube": 2.9}, [False, True]),
        ({"compiled-cdist": 1.2}, [True, False]),
    ):
        medians = {("", 256, name): value for name, value in (seconds | changed).items()}
        assert [check.ok for check in case.must_show(medians, case.full)] == expected
    for peak, ok in ((51.0, True), (49.0, False)):
        medians = {("", 256, "cube"): peak, ("", 256, "pydistill"): 1.0}
        assert [check.ok for check in CASES["mmd_memory"].must_show(medians, CASES["mmd_memory"].full)] == [ok]


def test_krr_loss_is_green_and_takes_less_memory(tmp_path: Path) -> None:
    for name in ("krr_loss", "krr_loss_memory"):
        assert run.main([name, "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "krr_loss.csv")
    assert {row["provider"] for row in rows} == {"solve", "cholesky", "pydistill"}
    found = rows_in(tmp_path / "krr_loss_memory.csv")
    peaks = {row["provider"]: float(row["median"]) for row in found if row["unit"] == "MiB"}
    assert peaks["solve"] > 1.5 * peaks["pydistill"] > 0


def test_frozen_convolutions_are_green(tmp_path: Path) -> None:
    assert run.main(["frozen_conv2d", "--quick", "--providers", "channels-last,pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "frozen_conv2d.csv")
    assert {row["x_value"] for row in rows} == {"3x20", "16x9", "32x11/2"}
    assert {row["provider"] for row in rows} == {"eager", "channels-last", "pydistill"}


def test_frozen_network_is_green(tmp_path: Path) -> None:
    assert run.main(["frozen_resnet18", "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    assert {row["provider"] for row in rows_in(tmp_path / "frozen_resnet18.csv")} == {"eager", "pydistill"}


def test_frozen_convolutions_see_a_wrong_input_gradient(tmp_path: Path) -> None:
    def unturned(layer: resnet.Layer) -> resnet.Thunk:
        wrong = replace(layer, weight=layer.weight.flip(2))
        return lambda: (resnet.layer_in_torch(layer)()[0], resnet.layer_in_torch(wrong)()[1])

    case = CASES["frozen_conv2d"].only([])
    case = replace(case, providers=case.providers | {"unturned": Entry(unturned)})
    assert run.run_case(case, size="quick", out=tmp_path) == 1


@pytest.mark.parametrize("name", ["kd_divergence", "sparse_label_loss"])
def test_label_losses_are_green(name: str, tmp_path: Path) -> None:
    assert run.main([name, "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    assert {row["provider"] for row in rows_in(tmp_path / f"{name}.csv")} == {CASES[name].baseline, "pydistill"}


def test_label_losses_gates_see_another_temperature(tmp_path: Path) -> None:
    def warmer(student: torch.Tensor, problem: label_losses.Logits) -> torch.Tensor:
        return label_losses.dense(student, replace(problem, T=problem.T + 0.01))

    case = CASES["kd_divergence"].only([])
    wrong = Entry(lambda problem: label_losses.prepare(problem, warmer))
    assert run.run_case(replace(case, providers=case.providers | {"wrong": wrong}), size="quick", out=tmp_path) == 1


def test_label_losses_must_beat_eager_and_compiled() -> None:
    case = CASES["kd_divergence"]
    for seconds, expected in (((3.0, 2.0), True), ((1.4, 2.0), False), ((3.0, 0.9), False)):
        medians = {
            ("", T, name): v for T in (4.0, 20.0) for name, v in zip(("eager", "compiled"), seconds, strict=True)
        }
        medians |= {("", T, "pydistill"): 1.0 for T in (4.0, 20.0)}
        assert all(check.ok for check in case.must_show(medians, case.full)) == expected


def test_statistics_and_the_recover_step_are_green(tmp_path: Path) -> None:
    names = ["bn_stat_match", "sre2l_recover_step"]
    assert run.main([*names, "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    for name in names:
        rows = rows_in(tmp_path / f"{name}.csv")
        assert {row["provider"] for row in rows} == {CASES[name].baseline, "pydistill"}


def test_a_step_without_the_statistics_is_red() -> None:
    case = CASES["sre2l_recover_step"]

    def without(problem: recover.Recovery) -> Callable[[], recover.Recovered]:
        return recover.stepping(problem, lambda x: torch.nn.functional.cross_entropy(problem.net(x), problem.labels))

    wrong = replace(case, providers={"repository": case.providers["repository"], "wrong": Entry(without)})
    assert any(not check.ok for check in case.gate(wrong, case.quick))
