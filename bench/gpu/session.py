"""Items one after the other, each in its own try and its result a line of JSON at once, until the time is used up."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]


class Wrong(Exception):
    """What was computed is not right; the second argument is what was found."""


class OutOfTime(Exception):
    pass


@dataclass(frozen=True)
class Item:
    """One line of the results: ``measure(tiny)`` gives its values by name."""

    name: str
    measure: Callable[[bool], Line]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
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


def run_item(item: Item, tiny: bool, seconds: float) -> Line:
    """The item's line. ``status``: ok, wrong (a check is red), failed (an exception), or out of time."""
    began = time.monotonic()
    values: Line = {}
    try:
        with _at_most(seconds):
            values, status = item.measure(tiny), "ok"
    except OutOfTime:
        status = "out of time"
    except Wrong as error:
        status, values = "wrong", {"error": error.args[0], **error.args[1]}
    except Exception as error:  # the line has all of it, and the next item goes on
        status = "failed"
        values = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {"item": item.name, "status": status, "seconds": round(time.monotonic() - began, 3), **values}


def device_is_lost() -> bool:
    """Whether every further call fails, as after an illegal address; only another process gets the device back."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_items(
    items: Sequence[Item], path: Path, minutes: float, *, tiny: bool = False, restart: Callable[[float], None]
) -> list[Line]:
    """Append each item's line to ``path``; those with a line there are skipped, unless their time had run out.

    Args:
        restart: called with the minutes that are left after an item that has lost the device.
    """
    end = time.monotonic() + 60 * minutes
    there = {line["item"] for line in lines_in(path) if line["status"] != "out of time"}
    for item in items:
        left = end - time.monotonic()
        if item.name in there:
            continue
        if left <= 0:
            break
        line = run_item(item, tiny, left)
        _append(path, line)
        print(_short(line), flush=True)
        if line["status"] == "failed" and device_is_lost():
            print("the device is lost to this process: going on in another", flush=True)
            restart((end - time.monotonic()) / 60)
    return lines_in(path)


def _short(line: Line) -> str:
    numbers = [f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float) and k != "seconds"]
    what = line["error"] if "error" in line else ", ".join(numbers)
    return f"{line['status']:4} {line['item']} ({line['seconds']:.1f} s): {what}"


def summary(lines: Sequence[Line]) -> str:
    """A table: times, speed over the first provider, and the shares of the ceilings that were measured before."""
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
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _share(amount: float | None, ms: float, scale: float, ceiling: float | None) -> str:
    if not amount or not ms:
        return ""
    rate = amount / ms / scale
    return f"{rate:.1f} ({rate / ceiling:.0%})" if ceiling else f"{rate:.1f}"
