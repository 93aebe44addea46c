"""Items one after the other, each in its own try and its result a line of JSON at once, until the time is used up.

They run in a process of their own: one that hangs, dies or loses the device takes neither the others nor the table
along.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]


def worst(errors: Sequence[float]) -> float:
    """The largest, or NaN if there is one: Python's `max` depends on their order."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


class Wrong(Exception):
    """What was computed is not right; the second argument is what was found."""


class OutOfTime(BaseException):  # no `except Exception` on its way takes it for its own
    pass


@dataclass(frozen=True)
class Item:
    """One line of the results: ``measure(tiny)`` gives its values by name."""

    name: str
    measure: Callable[[bool], Line]
    seconds: float = 60.0  # at most: several times what is expected


GRACE = 10.0  # seconds until the process ends in which an item does not heed its time
LOST = 3  # exit status of a process whose device is lost


@contextmanager
def _at_most(seconds: float, stacks: Path | None) -> Iterator[None]:
    """Ends the block after so many seconds: where Python runs by an exception, elsewhere, with ``stacks``, by the end
    of the process, whose threads' stacks are then in that file."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    seconds = max(seconds, 1e-3)
    before = signal.signal(signal.SIGALRM, stop)
    with (stacks or Path(os.devnull)).open("a") as file:
        if stacks is not None:
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=file)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if stacks is not None:
                faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)


def lines_in(path: Path) -> list[Line]:
    """The results in a file, of a last line that was cut off none."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def _append(path: Path, line: Line) -> None:
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(("\n" if before and not before.endswith("\n") else "") + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_item(item: Item, tiny: bool, left: float, stacks: Path | None = None) -> Line:
    """The item's line, in at most ``left`` seconds.

    ``status``: ok, wrong (a check is red), failed (an exception), too slow (for its own time), or out of time.
    """
    began = time.monotonic()
    values: Line = {}
    try:
        with _at_most(min(item.seconds, left), stacks):
            values, status = item.measure(tiny), "ok"
    except OutOfTime:
        status = "too slow" if item.seconds <= left else "out of time"
    except Wrong as error:
        status, values = "wrong", {"error": error.args[0], **error.args[1]}
    except Exception as error:  # the line has all of it, and the next item goes on
        status = "failed"
        values = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {"item": item.name, "status": status, "seconds": round(time.monotonic() - began, 3), **values}


def device_is_there(stacks: Path | None = None) -> bool:
    """Whether it still answers, as after an illegal address it does not to this process. What the last item kept of its
    memory is free then."""
    from pydistill.trajectory import release_graphs

    try:
        with _at_most(GRACE, stacks):
            torch.cuda.synchronize()
            release_graphs()
            gc.collect()
            torch.cuda.empty_cache()
    except (RuntimeError, OutOfTime):
        return False
    return True


def waiting(names: Sequence[str], path: Path) -> list[str]:
    """Those without a line, or in which the whole time ran out."""
    there = {line["item"] for line in lines_in(path) if line["status"] != "out of time"}
    return [name for name in names if name not in there]


def run_items(
    items: Sequence[Item], path: Path, minutes: float, *, tiny: bool = False, stacks: Path | None = None
) -> bool:
    """Append each item's line to ``path``, but of those that have one; false as soon as the device is lost."""
    end = time.monotonic() + 60 * minutes
    names = waiting([item.name for item in items], path)
    for item in items:
        left = end - time.monotonic()
        if left <= 0:
            break
        if item.name not in names:
            continue
        line = run_item(item, tiny, left, stacks)
        there = device_is_there(stacks)  # before the line: if it is not even told, the item has died
        _append(path, line)
        print(_short(line), flush=True)
        if not there:
            print("the device is lost to this process: going on in another", flush=True)
            return False
    return True


Runner = Callable[[Sequence[str], Path, float, Path, bool], None]


def leave(done: bool) -> None:
    """Ends the process of the items at once: no destructor has the last word on its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if done else LOST)


def supervise(run: Runner, names: Sequence[str], path: Path, minutes: float, *, tiny: bool = False) -> None:
    """Runs the items by ``run(names, path, minutes, stacks, tiny)`` in a process of its own, and in another one as
    often as that ends without `leave`: the item at which it did has ``status`` died then."""
    end = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    while (left := end - time.monotonic()) > 0 and (names := waiting(names, path)):
        with tempfile.TemporaryDirectory() as folder:
            stacks = Path(folder) / "stacks"
            began = time.monotonic()
            process = context.Process(target=run, args=(names, path, left / 60, stacks, tiny))
            process.start()
            try:
                process.join(left + 3 * GRACE)
            finally:  # also when this process is interrupted
                process.kill()
                process.join()
            if process.exitcode == 0:
                return
            if process.exitcode != LOST and (died := waiting(names, path)):
                status = {"item": died[0], "status": "died", "seconds": round(time.monotonic() - began, 3)}
                told = stacks.read_text() if stacks.exists() else ""
                why = "hung" if "Timeout" in told else "its process ended"
                line = {**status, "error": f"{why}, exit status {process.exitcode}", "traceback": told}
                _append(path, line)
                print(_short(line), flush=True)


def _short(line: Line) -> str:
    numbers = [f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float) and k != "seconds"]
    what = line["error"] if "error" in line else ", ".join(numbers)
    return f"{line['status']:4} {line['item']} ({line['seconds']:.1f} s): {what}"


def summary(lines: Sequence[Line]) -> str:
    """A table: times, speed over the first provider, and the shares of the ceilings that were measured before; then
    what calls ask of the driver."""
    by_name = {line["item"]: line for line in lines}
    ceilings = by_name.get("ceilings", {})
    rows = [("item", "status", "ms", "x baseline", "GB/s (of copy)", "TFLOP/s (of ceiling)")]
    for line in by_name.values():
        for name, ms in line.get("ms", {}).items():
            baseline = line.get("baseline")
            ratio = f"{line['ms'][baseline] / ms:.2f}" if baseline in line["ms"] and ms else ""
            rate = _share(line.get("bytes", {}).get(name), ms, 1e6, ceilings.get("copy GB/s"))
            precision = line.get("precision", "fp32")
            flops = _share(line.get("flops", {}).get(name), ms, 1e9, ceilings.get(f"{precision} TFLOP/s"))
            rows.append((f"{line['item']}: {name}", line["status"], f"{ms:.3f}", ratio, rate, flops))
        if not line.get("ms"):
            rows.append((line["item"], line["status"], "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, counts in by_name.get("requests", {}).get("requests", {}).items():
        table.append(f"{name} asks for: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return "\n".join(table)


def _share(amount: float | None, ms: float, scale: float, ceiling: float | None) -> str:
    if not amount or not ms:
        return ""
    rate = amount / ms / scale
    return f"{rate:.1f} ({rate / ceiling:.0%})" if ceiling else f"{rate:.1f}"
