"""Peak memory of one provider, in its own process: `python -m bench.memory CASE PROVIDER X [X ...]` prints JSON lines.

The figure is the peak resident size while the work runs, above the process's size after imports, building model and
inputs, and one step (so that thread pools and primitive caches are accounted for).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# For every provider alike: blocks of 64 KiB and more return to the system when they are freed, so the peak is what the
# work keeps alive and not what the allocator happens to hold (which varies by tens of MiB from run to run).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_of(work: Callable[[], object]) -> int:
    """Peak resident size of this process, in bytes, while `work` runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    except OSError:
        return _sampled_peak_of(work)
    work()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _sampled_peak_of(work: Callable[[], object]) -> int:
    process = psutil.Process()
    peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
    return peak


def measure(case: str, provider: str, xs: list[int], size: str) -> dict[int, int]:
    """Peak bytes above the baseline for every x, from one fresh process."""
    finished = in_process(__spec__.name, case, provider, *map(str, xs), "--size", size)
    if finished.returncode != 0:
        raise RuntimeError(f"peak memory of {case}/{provider} at {xs}: the process ended with {finished.returncode}")
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    return {row["x"]: row["peak"] - row["baseline"] for row in rows}


def in_process(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of this package in a separate process, under `ALLOCATOR`, and captures its output.

    In an empty folder: Python looks for modules in the folder that it is started in, where ours (`pydistill/select`) or
    the user's may have the names of Python's own.
    """
    # the folder that contains the whole package, whether a checkout's root or site-packages
    root = Path(__file__).resolve().parents[module.count(".")]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=os.environ | ALLOCATOR | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )


def main() -> None:
    from .case import SIZES
    from .registry import CASES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("provider")
    parser.add_argument("x", type=int, nargs="+")
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()

    case = CASES[options.case]
    provider = case.providers[options.provider]
    problem = case.problem(case.config(options.size), max(options.x))
    thunks = {x: provider.prepare(problem.with_steps(x)) for x in options.x}
    provider.prepare(problem.with_steps(1))()
    gc.collect()
    baseline = psutil.Process().memory_info().rss
    for x, thunk in thunks.items():
        peak = peak_of(thunk)
        gc.collect()
        print(json.dumps({"x": x, "peak": peak, "baseline": baseline}), flush=True)


if __name__ == "__main__":
    main()
