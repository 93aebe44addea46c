"""What the commands share: signals, progress, tables, pictures, files of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import rich.console
import rich.progress
import rich.table
import torch
from PIL import Image

from pydistill._atomic import naming
from pydistill.data import DistilledSet, write_atomic


class Interrupted(Exception):
    """A signal asked to stop, and the step under way is done."""


class Stop:
    """Turns the first SIGINT or SIGTERM into `Interrupted` at the next call; a second one ends the process at once."""

    requested = False

    def __call__(self) -> None:
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stop]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(number: int, frame: Any) -> None:
            self.requested = True
            for each in previous:
                signal.signal(each, signal.SIG_DFL)

        for number in previous:
            signal.signal(number, request)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def plain_console(**options: Any) -> rich.console.Console:
    """A console that prints what it is given: brackets and colons in a path or a name are no markup."""
    return rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)


def progress_bars(console: rich.console.Console) -> rich.progress.Progress:
    # the default's column of descriptions reads markup whatever the console does
    described = rich.progress.TextColumn("{task.description}", style="progress.description", markup=False)
    columns = rich.progress.Progress.get_default_columns()[1:]
    noted = rich.progress.TextColumn("{task.fields[note]}", markup=False)
    return rich.progress.Progress(described, *columns, noted, console=console, disable=not console.is_terminal)


def accuracy_table(title: str, rows: str, students: int) -> rich.table.Table:
    table = rich.table.Table(title=title)
    table.add_column(rows)
    for heading in ("images", "epochs", "learning rate", f"test accuracy of {students} students"):
        table.add_column(heading, justify="right")
    return table


def add_row(
    table: rich.table.Table, label: str, images: int, epochs: int, lr: float, accuracies: Sequence[float]
) -> None:
    table.add_row(label, str(images), str(epochs), f"{lr:.4f}", percentage(accuracies, deviation=True))


def percentage(accuracies: Sequence[float], *, deviation: bool | None = None) -> str:
    """The mean of accuracies in ``[0, 1]``, and their deviation; by default where there are several."""
    deviation = len(accuracies) > 1 if deviation is None else deviation
    more = f" ± {100 * pstdev(accuracies):.1f}" if deviation else ""
    return f"{100 * mean(accuracies):.1f}{more} %"


def picture(distilled: DistilledSet, ipc: int) -> bytes:
    """A PNG of the distilled images, enlarged to about 64 pixels, a column for each class."""
    images = distilled.pixels()
    scale, gap = max(1, 64 // images.shape[2]), 2
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=1.0)  # [K * ipc, 3, h, w]
    count, channels, height, width = images.shape
    grid = images.view(count // ipc, ipc, channels, height, width).permute(1, 3, 0, 4, 2)
    pixels = (grid.reshape(ipc * height, count // ipc * width, channels) * 255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def device_of(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def append_line(path: Path, record: dict[str, Any]) -> None:
    with naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def kept_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> bytes:
    """A file of JSON lines without the records that are not to stay, and without what a killed process half wrote."""
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            kept += [line + "\n"] if keep(json.loads(line)) else []
    return "".join(kept).encode()


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves of a file of JSON lines, if it is there, what `kept_lines` does."""
    if path.exists():
        write_atomic(path, kept_lines(path, keep))
