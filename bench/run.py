"""`python -m bench.run [case ...]`: every case and its peers in one run, interleaved, after its gate has passed.

Exit status: 0 all well, 1 a gate is red (then no figure is reported), 3 a bound that a case must show was missed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import ROOT, memory
from .case import Case, Check, Config, Point, r_squared
from .registry import CASES

RESULTS = ROOT / "bench" / "results"
COLUMNS = [
    *("case", "provider", "mode", "metric", "unit", "x_name", "x_value"),
    *("median", "p20", "p80", "config", "machine", "versions", "commit"),
]
RATIO = "baseline / provider"
BRIEF = ("instance_norm_relu_avg_pool", "unroll_step", "unroll_memory", "train_students")
LINE = "R^2 of a line in x"

Row = dict[str, Any]
Samples = dict[str, list[float]]


class RedGate(Exception):
    """A provider is wrong, so nothing is measured."""


def passed(checks: Iterable[Check]) -> int:
    """The number of checks, all of them green; prints every red one and raises if there is any."""
    done = list(checks)
    red = [check for check in done if not check.ok]
    for check in red:
        print(f"  {check}")
    if red:
        raise RedGate(f"{len(red)} of {len(done)} checks are red")
    return len(done)


def seconds(thunk: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def measured(case: Case, point: Point, repeats: int, measure: Callable[[Callable[[], Any]], float]) -> Samples:
    """`measure` (in seconds or bytes) of every provider, interleaved."""
    problem = point.problem()
    thunks = {name: case.providers[name].prepare(problem) for name in point.providers}
    # the first run of each warms it up (compilation, caches), and its output is checked
    checks = passed(case.check(case, point, problem, {name: thunk() for name, thunk in thunks.items()}))
    print(f"  {_label(case, point)}: {checks} checks green", flush=True)
    scale = {"s": 1.0, "ms": 1e3, "MiB": 2**-20, "B": 1.0}[case.unit] / point.per
    samples: Samples = {name: [] for name in thunks}
    for _ in range(repeats):
        for name, thunk in thunks.items():
            samples[name].append(measure(thunk) * scale)
    return samples


def peaks(case: Case, config: Config, points: Sequence[Point], repeats: int, size: str) -> list[Samples]:
    check_point = Point(config["check_steps"], lambda: None, tuple(case.providers))
    assert case.problem is not None
    problem = case.problem(config, config["check_steps"])
    outputs = {name: entry.prepare(problem)() for name, entry in case.providers.items()}
    checks = passed(case.check(case, check_point, problem, outputs))
    print(f"  {_label(case, check_point)}: {checks} checks green", flush=True)
    samples: list[Samples] = [{name: [] for name in point.providers} for point in points]
    for _ in range(repeats):
        for name in case.providers:
            at = [point.x for point in points if name in point.providers]
            found = memory.measure(case.name, name, at, size)
            for point, sample in zip(points, samples, strict=True):
                if name in point.providers:
                    sample[name].append(found[point.x] / 2**20)
    return samples


def rows_of(case: Case, config: Config, points: Sequence[Point], samples: Sequence[Samples], repeats: int) -> list[Row]:
    """One row per measurement, and one for its ratio to the baseline, taken round by round: adjacent in time."""
    common = {
        "case": case.name,
        "x_name": case.x_name,
        "config": json.dumps(
            {"dtype": "float32"}
            | {k: v for k, v in config.items() if k != "gate"}
            | {"repeats": repeats, "threads": torch.get_num_threads()}
        ),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    rows: list[Row] = []
    for point, sample in zip(points, samples, strict=True):
        baseline = np.array(sample[case.baseline]) if case.baseline in sample else None
        for name, values in sample.items():
            place = {"provider": name, "mode": point.mode or case.providers[name].mode, "x_value": point.x}
            rows.append(common | place | {"metric": case.metric, "unit": case.unit} | _quantiles(np.array(values)))
            # a peak below the system's resolution is zero and has no ratio
            if baseline is not None and name != case.baseline and min(values) > 0:
                rows.append(common | place | {"metric": RATIO, "unit": "x"} | _quantiles(baseline / np.array(values)))
    if case.lines:
        rows += [common | row for row in _lines(rows)]
    return rows


def _lines(rows: Sequence[Row]) -> list[Row]:
    """How close each mode's medians are to a line: R^2 of a linear fit."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        found.setdefault((row["mode"], row["provider"]), {})[row["x_value"]] = row["median"]
    place = {"metric": LINE, "unit": "", "x_value": "all"}
    return [
        place | {"mode": mode, "provider": provider} | _quantiles(np.array([r_squared(points)]))
        for (mode, provider), points in found.items()
    ]


def run_case(
    case: Case,
    *,
    size: str = "full",
    repeats: int | None = None,
    out: Path | None = RESULTS,
    measure: Callable[[Callable[[], Any]], float] | None = None,
) -> int:
    """Gate, measure, print, write `out/<case>.csv`; the exit status.

    What is measured is wall time, or the resident size of subprocesses for a case in MiB, unless `measure` is given.
    """
    config = case.config(size)
    repeats = repeats or (2 if size != "full" and case.unit != "MiB" else case.repeats)
    print(f"{case.name}: {case.metric} [{case.unit}]; {machine()}; {versions()}", flush=True)
    points = case.points(case, config)
    try:
        print(f"  gate: {passed(case.gate(case, config))} checks green", flush=True)
        if case.unit == "MiB" and measure is None:
            samples = peaks(case, config, points, repeats, size)
        else:
            samples = [measured(case, point, repeats, measure or case.measure or seconds) for point in points]
    except RedGate as red:
        print(f"  {case.name}: RED GATE, nothing is measured: {red}", flush=True)
        return 1
    rows = rows_of(case, config, points, samples, repeats)
    _print_table(case, rows)
    if out is not None:
        _write(out / f"{case.name}.csv", rows)
    if size != "full":
        return 0
    medians = {
        (row["mode"], row["x_value"], row["provider"]): row["median"] for row in rows if row["metric"] == case.metric
    }
    bounds = list(case.must_show(medians, config))
    for bound in bounds:
        print(f"  must show: {bound}")
    return 0 if all(bound.ok for bound in bounds) else 3


def brief(names: Sequence[str]) -> int:
    """What `pydistill bench` does: cases at sizes that take minutes, tables but no files."""
    unknown = set(names) - set(CASES)
    if unknown:
        raise ValueError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    cases = [CASES[name] for name in names or BRIEF]
    return max(run_case(c.only(c.brief_providers or tuple(c.providers)), size="brief", out=None) for c in cases)


def _label(case: Case, point: Point) -> str:
    return f"{point.mode + ', ' if point.mode else ''}{case.x_name} {point.x}"


def _quantiles(values: np.ndarray) -> dict[str, float]:
    median, p20, p80 = np.quantile(values, [0.5, 0.2, 0.8])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def _print_table(case: Case, rows: Sequence[Row]) -> None:
    ratios = {(r["mode"], r["x_value"], r["provider"]): r for r in rows if r["metric"] == RATIO}
    header = (case.x_name, "provider", "mode", f"median [{case.unit}]", "20 %", "80 %", f"{case.baseline} / it")
    lines = [header]
    for row in rows:
        if row["metric"] != case.metric:
            continue
        ratio = ratios.get((row["mode"], row["x_value"], row["provider"]))
        if ratio is None:  # the baseline, or a point that it does not reach
            text = "1" if row["provider"] == case.baseline else ""
        else:
            text = f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
        figures = (f"{row[key]:.4g}" for key in ("median", "p20", "p80"))
        lines.append((str(row["x_value"]), row["provider"], row["mode"], *figures, text))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {key: f"{row[key]:.6g}" for key in ("median", "p20", "p80")})
    os.replace(partial, path)


def machine() -> str:
    """CPU model and core count, and the CUDA device if there is one."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = (line.partition(":") for line in info.read_text().splitlines())
        model = next((value.strip() for key, _, value in fields if key.strip() == "model name"), model)
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores{device}"


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("pydistill")
    except PackageNotFoundError:
        ours = "not installed"
    return f"pydistill {ours}, torch {torch.__version__}, python {platform.python_version()}"


def commit() -> str:
    """The measured commit; marked if the tree differs from it in more than results."""
    if not (ROOT / ".git").exists():  # installed: the folder may be inside another repository
        return "none"
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "none"
    command = [*git, "status", "--porcelain", "--", ":/", ":(exclude)bench/results"]
    changes = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return head.stdout.strip() + ("+changes" if changes else "")


def parsed(
    program: str, about: str, cases: Collection[str], arguments: Sequence[str] | None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options of a program that measures these cases."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("names", nargs="*", metavar="case", help=f"any of {', '.join(cases)}; all without a name")
    parser.add_argument("--repeats", type=int, help="rounds; each case has its own number of them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--providers", help="only these beside the baseline, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of the CSV files (bench/results; a partial run needs another)")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(cases)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.out is None and (options.quick or options.providers):
        parser.error("a partial run must not replace the results: name a folder with --out")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parsed("bench.run", __doc__, CASES, arguments)
    cases = [CASES[name] for name in options.names or CASES]
    if options.providers:
        names = options.providers.split(",")
        unknown = set(names).difference(*(case.providers for case in cases))
        if unknown:
            parser.error(f"--providers: none of the cases has {', '.join(sorted(unknown))}")
        cases = [case.only(names) for case in cases]
    status = 0
    for case in cases:
        found = run_case(
            case, size="quick" if options.quick else "full", repeats=options.repeats, out=options.out or RESULTS
        )
        status = found if status in (0, 3) and found else status
    return status


if __name__ == "__main__":
    sys.exit(main())
