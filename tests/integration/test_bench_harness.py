"""The benchmark harness, on unrolled steps and GPU cases at tiny sizes: a wrong provider gets no figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import memory, run
from bench.case import Case, Check, Entry
from bench.gpu import __main__ as gpu_program
from bench.gpu import cases as gpu
from bench.peers import eager, training
from bench.peers.problem import Problem, Result, Thunk, make_problem
from bench.registry import CASES
from tests.integration.results import rows_in

pytestmark = pytest.mark.usefixtures("one_thread")


def halved(problem: Problem) -> Thunk:
    """The factor that TESLA's published code loses: the right direction with the wrong length."""
    right = eager.prepare(problem)

    def wrong() -> Result:
        loss, d_images, d_lr = right()
        return Result(loss, d_images / 2, d_lr)

    return wrong


def with_entry(name: str, entry: Entry) -> Case:
    case = CASES["unroll_step"]
    return replace(case, providers={"eager-plain": case.providers["eager-plain"], name: entry})


def test_unroll_step_is_green_and_its_rows_are_complete(tmp_path: Path) -> None:
    providers = "eager-accelerated,tesla,exact,first_order"  # compiling takes longer than this file may
    assert run.main(["unroll_step", "--quick", "--providers", providers, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "unroll_step.csv")
    assert list(rows[0]) == run.COLUMNS
    assert all(value for row in rows for value in row.values())
    assert {row["provider"] for row in rows} == {"eager-plain", *providers.split(",")}
    assert {row["mode"] for row in rows if row["provider"] in ("tesla", "first_order")} == {"first_order"}
    assert sum(row["metric"] == run.RATIO for row in rows) == 4
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in rows)
    assert json.loads(rows[0]["config"])["steps"] == 3


@pytest.mark.exhaustive
def test_networks_within_shares_of_the_loops_memory(tmp_path: Path) -> None:
    """Without the compiled engine's provider, which takes a minute to compile."""
    providers = ["generic-half", "generic-eighth"]
    assert run.main(["unroll_networks", "--quick", "--providers", ",".join(providers), "--out", str(tmp_path)]) == 0
    found = {row["provider"] for row in rows_in(tmp_path / "unroll_networks.csv")}
    assert found == {"eager-plain", *providers}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["unroll_step_networks", "unroll_step_large", "mtt_step"])
def test_other_steps_are_green(name: str, tmp_path: Path) -> None:
    assert run.main([name, "--quick", "--providers", "exact", "--out", str(tmp_path)]) == 0
    assert {row["provider"] for row in rows_in(tmp_path / f"{name}.csv")} == {"eager-plain", "exact"}


@pytest.mark.exhaustive
def test_unroll_memory_is_measured_in_subprocesses(tmp_path: Path) -> None:
    assert run.main(["unroll_memory", "--quick", "--providers", "exact", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "unroll_memory.csv")
    peaks = {(row["provider"], row["x_value"]): float(row["median"]) for row in rows if row["unit"] == "MiB"}
    assert peaks["eager-plain", "4"] > 2 * peaks["exact", "4"] > 0
    assert set(peaks) == {(provider, steps) for provider in ("eager-plain", "exact") for steps in ("1", "4")}


def test_train_students_is_green(tmp_path: Path) -> None:
    assert run.main(["train_students", "--quick", "--providers", "pydistill", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "train_students.csv")
    assert {(row["provider"], row["x_value"]) for row in rows} == {("eager", "3"), ("pydistill", "3")}


def test_train_students_sees_a_wrong_optimizer(tmp_path: Path) -> None:
    def without_decay(problem: training.Training) -> training.Thunk:
        return training.prepare_eager(replace(problem, weight_decay=0.0))

    case = CASES["train_students"].only([])
    case = replace(case, providers=case.providers | {"wrong": Entry(without_decay)})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_train_students_must_beat_both_compiled_loops() -> None:
    seconds = {"eager": 9.0, "compiled": 2.0, "compiled-vmap": 3.0, "pydistill": 1.0}
    case = CASES["train_students"]
    for changed, expected in (({}, [True, True]), ({"compiled": 1.1}, [True, False]), ({"eager": 2.9}, [False, True])):
        medians = {("", 5, name): value for name, value in (seconds | changed).items()}
        assert [check.ok for check in case.must_show(medians, case.full)] == expected


def test_a_wrong_provider_turns_the_gate_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = with_entry("halved", Entry(halved, "exact"))
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    printed = capsys.readouterr().out
    assert "RED GATE" in printed
    assert "MISSED: halved, float64 d_images" in printed
    assert "median" not in printed
    assert not list(tmp_path.iterdir())


def test_a_provider_wrong_only_in_single_precision_turns_the_check_red(tmp_path: Path) -> None:
    def prepare(problem: Problem) -> Thunk:
        return (eager.prepare if problem.theta0.dtype == torch.float64 else halved)(problem)

    assert run.run_case(with_entry("halved", Entry(prepare, "exact")), size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_an_estimator_cannot_pass_for_the_exact_gradient(tmp_path: Path) -> None:
    tesla = CASES["unroll_step"].providers["tesla"]
    assert run.run_case(with_entry("tesla", replace(tesla, mode="exact")), size="quick", out=tmp_path) == 1


def test_the_exit_status_of_the_command_is_that_of_its_worst_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "unroll_step", with_entry("halved", Entry(halved, "exact")))
    names = ["unroll_step", "instance_norm_relu_avg_pool"]
    assert run.main([*names, "--quick", "--providers", "halved", "--out", str(tmp_path)]) == 1


def test_a_missed_bound_has_its_own_exit_status(tmp_path: Path) -> None:
    case = with_entry("twice", Entry(eager.prepare, "exact"))
    unreachable = replace(
        case,
        full=case.quick,
        must_show=lambda medians, config: iter([Check("twice", "speed-up", 1.0, 1e9, at_least=True)]),
    )
    assert run.run_case(unreachable, repeats=1, out=tmp_path) == 3
    assert (tmp_path / "unroll_step.csv").exists()


def test_nan_is_red() -> None:
    assert not Check("provider", "error", float("nan"), 1.0).ok
    assert not Check("provider", "speed-up", float("nan"), 1.0, at_least=True).ok


def test_peak_sees_memory_that_is_gone_again() -> None:
    def work() -> None:
        torch.ones(64 << 20, dtype=torch.uint8)  # so large that malloc never has it at hand

    before = memory.peak_of(lambda: None)
    assert memory.peak_of(work) - before > 60 << 20
    assert memory._sampled_peak_of(work) > 0


def test_problems_draw_without_replacement_until_used_up() -> None:
    sizes = {"channels": 3, "classes": 4, "width": 8, "depth": 2, "image_size": 10, "images": 6, "batch": 4}
    problem = make_problem(**sizes, steps=4)
    assert [len(batch) for batch in problem.batches] == [4, 2, 4, 2]
    assert sorted(torch.cat(problem.batches[:2]).tolist()) == list(range(6))
    assert problem.theta0.dtype == torch.float32


@pytest.mark.parametrize("arguments", [["nothing"], ["--quick"], ["--repeats", "0"], ["--providers", "exact"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2


def on_the_cpu(name: str, providers: list[str]) -> Case:
    """A case of bench.gpu without what needs a device: its clock, its graphs, and the time taken by compilation."""
    case = gpu.CASES[name].only(providers)
    return replace(case, quick=case.quick | {"device": "cpu"})


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "providers"),
    [("gpu_block", ["pydistill", "copy"]), ("gpu_step", ["layers"])],
)
def test_gpu_cases_are_green_on_the_cpu(name: str, providers: list[str], tmp_path: Path) -> None:
    # any measure: gates and rows are the same
    assert run.run_case(on_the_cpu(name, providers), size="quick", out=tmp_path, measure=run.seconds) == 0
    rows = rows_in(tmp_path / f"{name}.csv")
    assert list(rows[0]) == run.COLUMNS
    assert {row["provider"] for row in rows} == {"eager", *providers}
    modes = 8 if name == "gpu_block" else 6
    assert len({row["mode"] for row in rows}) == modes
    assert json.loads(rows[0]["config"])["dtype"] == "named in mode"


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_gpu_step_gates_see_a_wrong_tangent(precision: str, tmp_path: Path) -> None:
    def wrong(problem: gpu.Step) -> gpu.Tensors:
        *rest, d_images = gpu.step_ours(problem)()
        return (*rest, d_images / 2) if problem.precision == precision and rest[1:] else (*rest, d_images)

    case = on_the_cpu("gpu_step", [])
    case = replace(case, providers=case.providers | {"wrong": Entry(lambda problem: lambda: wrong(problem))})
    assert run.run_case(case, size="quick", out=tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_gpu_without_a_device_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_program.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "no CUDA device" in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["nothing"], ["--minutes", "some"], ["--providers", "layers"]])
def test_gpu_refuses_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        raise SystemExit(gpu_program.main(arguments))
    assert refused.value.code == 2
