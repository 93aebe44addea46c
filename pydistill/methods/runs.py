"""A run: a method's job in a folder that keeps options, checkpoints, metrics and results, and can be resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pydistill.data import read_safetensors, write_atomic, write_safetensors
from pydistill.methods.folder import Folder, append_line, as_json, kept_lines, options_in
from pydistill.methods.method import Inputs, Job, Method, OptionError, device_of
from pydistill.methods.precision import switches
from pydistill.methods.ranks import joined, wait_for_ranks, world

__all__ = ["Interrupted", "Progress", "Run", "run"]


class Interrupted(Exception):
    """The run was asked to stop, and the step in progress is done."""


class Progress(NamedTuple):
    """How far a run is."""

    phase: str
    done: int
    total: int
    note: str  # a loss, an accuracy


class Run:
    """One job in one folder. See `run`, which makes and runs it.

    Attributes:
        folder: the path.
        device: where to compute.
        first: whether this is the first of the ranks, which writes what they make together.
        begun: whether the folder holds a run that can be resumed.
    """

    def __init__(
        self,
        method: Method,
        inputs: Inputs,
        *,
        out: str | os.PathLike[str],
        resume: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        tell: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        if resume and not method.resumable:
            raise OptionError("resume", f"expected none, {method.name} starts anew")
        self.folder = Path(out)
        self._kept = options_in(self.folder, method.name) if resume else None
        self.method = method
        self.inputs = inputs if self._kept is None else inputs.resumed(self._kept)
        try:
            self.device = device_of(self.inputs.device)
        except OptionError as error:
            if self.inputs.device == inputs.device:
                raise
            raise OptionError("device", f"{error.reason}, on which the run was begun: name another") from None
        self.begun, self.first = resume, True
        self._on_progress, self._tell, self._stop = on_progress, tell, stop

    def go(self) -> Job:
        """Does the job and returns it with its results; raises as `run` does."""
        with joined(self.device):
            self.first = world()[0] == 0
            self.method = self.method.on(self.device, self._kept)
            # what the job leaves to torch's switches, tests among it, is in each process as when the run began
            with switches(getattr(self.method, "precision", "auto"), self.device):
                return self._go()

    def _go(self) -> Job:
        if world()[1] > 1 and not self.method.shared:
            raise ValueError(f"{self.method.name}: expected one process, whose work no others share, got {world()[1]}")
        folder = Folder(self.folder, self._kept, resumable=self.method.resumable, first=self.first)
        free = (*self.method.free, *self.inputs.how())
        folder.check_given(self._given(), free)  # before any other check
        folder.check_files(self.inputs.files())
        job = self.method.job(self.inputs, self.device)
        self._options = job.stored()
        record = {**self._options, **self.inputs.how()}
        folder.check_same(record, (*free, "data"))
        record["data"] = None if job.data is None else job.data.marks()
        folder.check_data(record["data"])
        self.stop()
        with folder.held():
            self._done = {path: self._epoch(path) for path in sorted(self.folder.glob("*-state.safetensors"))}
            job.opened(self)
            lines = {}
            if self.first:
                stands = lambda record: job.stands(self, record)  # noqa: E731
                lines = {path: kept_lines(path, stands) for path in self.folder.glob("metrics*.jsonl")}
            # All checks have passed: from here on the folder holds a run that can be resumed.
            folder.begin(record if self.method.resumable else None)
            self.begun = self.method.resumable
            for path, kept in lines.items():
                write_atomic(path, kept)
            wait_for_ranks()
            self.tell(f"{job.title} -> {self.folder}")
            for phase in job.phases():
                phase(self)
            if self.first:
                write_atomic(self.folder / "results.json", as_json(job.results))
            wait_for_ranks()
        return job

    def _given(self) -> dict[str, Any]:
        """What was given, by the names under which a folder may keep it."""
        config = asdict(self.method)  # type: ignore[call-overload]
        return {"method": self.method.name, "config": config, **self.inputs.stored()}

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self._stop is not None and self._stop()

    def stop(self) -> None:
        """Raises `Interrupted` if the run was asked to stop."""
        if self.stopping:
            raise Interrupted

    def tell(self, text: str) -> None:
        """Shows a line of text to the user."""
        if self.first and self._tell is not None:
            self._tell(text)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a line of metrics; each rank has its own file."""
        rank = world()[0]
        append_line(self.folder / f"metrics{f'-rank{rank}' if rank else ''}.jsonl", record)

    def progress(self, phase: str, total: int, done: int = 0) -> Callable[..., None]:
        """A function to call with the number of steps just done, one by default, and a note."""
        last = ""

        def advance(count: int = 1, note: str | None = None) -> None:
            nonlocal done, last
            done, last = done + count, last if note is None else note
            if self._on_progress is not None:
                self._on_progress(Progress(phase, done, total, last))

        advance(0)
        return advance

    def steps(self, phase: str, total: int, done: int = 0) -> Callable[[], None]:
        """`progress`, but the run may be stopped after each step."""
        advance = self.progress(phase, total, done)

        def on_step() -> None:
            advance()
            self.stop()

        return on_step

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a finished phase left in the file ``name``, else the result of ``make``, which is written there."""
        path, kind = self.folder / name, self._kind(name)
        if not path.exists():
            began = time.monotonic()
            write_safetensors(path, make(), kind, self._options)
            self.tell(f"{path.stem}: {time.monotonic() - began:.0f} s")
        return read_safetensors(path, kind)[0]

    def checkpoint(self, name: str) -> dict[str, Tensor] | None:
        """What `write_checkpoint` wrote, if anything."""
        path = self.folder / name
        return read_safetensors(path, self._kind(name))[0] if path.exists() else None

    def write_checkpoint(self, name: str, state: dict[str, Tensor]) -> None:
        write_safetensors(self.folder / name, state, self._kind(name), self._options)

    def _kind(self, name: str) -> str:
        return f"{self.method.name} {Path(name).stem}"

    @contextmanager
    def epochs(self, phase: str, total: int) -> Iterator[tuple[dict[str, Tensor] | None, Callable[..., None]]]:
        """A training's state to continue from, and a function that logs an epoch, shows it and saves its state."""
        path = self._state(phase)
        state = read_safetensors(path, self.method.state_kind)[0] if path.exists() else None
        advance = self.progress(phase, total, self.epochs_done(phase))

        def on_epoch(record: dict[str, Any], state: dict[str, Tensor]) -> None:
            # the log line first: a run killed before it saves the state drops it on resuming, and never lacks it
            self.log({"phase": phase, **record})
            write_safetensors(path, state, self.method.state_kind, {})
            advance(note=f"loss {record['loss']:.4f}")
            self.stop()

        yield state, on_epoch

    def epochs_done(self, phase: str) -> int:
        """How many epochs the saved state of a phase has completed."""
        return self._done.get(self._state(phase), 0)

    def _state(self, phase: str) -> Path:
        return self.folder / f"{phase}-state.safetensors"

    def _epoch(self, path: Path) -> int:
        return int(read_safetensors(path, self.method.state_kind)[0]["epoch"])


def run(
    method: Method,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Runs a method end to end into a folder, as `pydistill` does on the command line: data, phases, files, results.

    A run killed or interrupted at any moment can be continued with ``resume``, to the same bytes as an uninterrupted
    one. Under torchrun the ranks share the work of the methods that can.

    Args:
        method: its hyper-parameters, such as ``HeLlO.preset("digits")``.
        out: the folder, new or empty; with ``resume`` that of the run.
        resume: continue the run in ``out``, whose options are the same; ``device`` and ``root`` may be others, and are
            the run's if not given.
        on_progress: called with a `Progress` as the work proceeds.
        tell: called now and then with a line of text.
        stop: called after each step; once it returns True, the run writes a checkpoint and raises `Interrupted`.
        inputs: fields of ``method.inputs``: ``dataset="fashion-mnist"``, ``root``, ``device="cuda:1"``; defaults depend
            on the method and the data set.

    Returns:
        The results, which are also in ``results.json``.

    Raises:
        OptionError: a refused input, a folder that is not new, or other options than those of the run.
        ValueError: hyper-parameters that do not fit the data, or a damaged file; it is named.
        FileNotFoundError: no run to resume, or no data.
        FloatingPointError: the work diverges.
        Interrupted: ``stop`` returned True.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: expected hyper-parameters, such as HeLlO.preset('digits'), got {method!r}")
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out: expected the path of a folder, got {out!r}")
    given = method.inputs.for_method(method, **inputs)
    if not resume:
        method.check_used(given, inputs)
    made = Run(method, given, out=out, resume=resume, on_progress=on_progress, tell=tell, stop=stop)
    return made.go().results
