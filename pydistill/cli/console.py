"""What the commands share: signals, progress, tables."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, pstdev
from typing import Any

import rich.console
import rich.progress
import rich.table

from pydistill.methods.runs import Interrupted, Progress

__all__ = ["Bars", "Stop", "accuracy_table", "add_row", "percentage", "plain_console"]


class Stop:
    """Turns the first SIGINT or SIGTERM into `Interrupted` at the next call; a second ends the process at once."""

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
    """A console that prints text as it is: brackets and colons in a path or a name are not markup."""
    return rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)


def _progress_bars(console: rich.console.Console) -> rich.progress.Progress:
    # the default column of descriptions parses markup regardless of the console
    described = rich.progress.TextColumn("{task.description}", style="progress.description", markup=False)
    columns = rich.progress.Progress.get_default_columns()[1:]
    noted = rich.progress.TextColumn("{task.fields[note]}", markup=False)
    return rich.progress.Progress(described, *columns, noted, console=console, disable=not console.is_terminal)


class Bars:
    """A bar for each phase of a run, inside the block."""

    def __init__(self, console: rich.console.Console):
        self._progress = _progress_bars(console)
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, now: Progress) -> None:
        if now.phase not in self._tasks:
            self._tasks[now.phase] = self._progress.add_task(now.phase, total=now.total, note="")
        self._progress.update(self._tasks[now.phase], completed=now.done, note=now.note)

    def bar(self, phase: str, total: int, done: int = 0) -> Callable[..., None]:
        """Adds a bar: returns a function to call with the number of steps just done, one by default, and a note."""
        task = self._progress.add_task(phase, total=total, completed=done, note="")

        def advance(count: int = 1, note: str | None = None) -> None:
            if note is None:
                self._progress.update(task, advance=count)
            else:
                self._progress.update(task, advance=count, note=note)

        return advance


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
    """The mean of accuracies in ``[0, 1]``, and their deviation, by default if there are several."""
    deviation = len(accuracies) > 1 if deviation is None else deviation
    more = f" ± {100 * pstdev(accuracies):.1f}" if deviation else ""
    return f"{100 * mean(accuracies):.1f}{more} %"
