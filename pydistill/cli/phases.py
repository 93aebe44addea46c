"""What the methods share that make more than a set: a folder of phases, each of which leaves a file."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import rich.console
import tyro
from torch import Tensor

from pydistill.cli.console import Interrupted, Stop, as_json, keep_lines
from pydistill.cli.settings import DatasetName
from pydistill.data import read_safetensors, write_atomic, write_safetensors

T = TypeVar("T")


def parse(argv: list[str], name: str, command: type[T], preset: Callable[[str], Any]) -> T:
    """The options of ``distill <name>``, whose defaults are the data set's."""
    dataset = next((value for flag, value in pairwise(argv) if flag == "--dataset"), "digits")
    dataset = next((part.removeprefix("--dataset=") for part in argv if part.startswith("--dataset=")), dataset)
    if dataset not in get_args(DatasetName):
        raise ValueError(f"--dataset: expected one of {', '.join(get_args(DatasetName))}, got {dataset!r}")
    return tyro.cli(
        command,
        args=argv,
        prog=f"pydistill distill {name}",
        default=command(preset(dataset), dataset),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


@dataclass(frozen=True)
class Phases:
    """The folder of a run that goes on with --resume after the last phase, or checkpoint, whose file is there."""

    method: str
    stored: dict[str, Any]
    """The options that say what the run makes."""
    out: Path | None
    resume: bool
    console: rich.console.Console
    stop: Stop

    def checked(self, dataset: str) -> Path:
        """The folder; nothing is written.

        Raises:
            ValueError: --out is not new or empty, or --resume does not fit it.
            FileNotFoundError: --resume without a run.
        """
        if self.resume:
            if self.out is None:
                raise ValueError("--resume: expected --out with the folder of the run to go on with")
            path, wanted = self.out / "config.json", f"the options of a run of pydistill distill {self.method}"
            if not path.is_file():
                raise FileNotFoundError(f"{path}: expected {wanted}, found no file")
            try:
                kept = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: expected {wanted} as JSON; it is truncated or foreign ({error})") from error
            if kept != self.stored:
                raise ValueError(f"--resume: expected the options of the run in {self.out}, {kept}, got {self.stored}")
            return self.out
        if self.out is None:
            return Path("runs") / f"{self.method}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out: expected a new or empty folder, got {self.out}; --resume goes on with a run")
        return self.out

    @contextmanager
    def opened(self, folder: Path, dataset: str) -> Iterator[None]:
        """Makes the folder; a run that is stopped inside says how to go on."""
        self.stop()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        write_atomic(folder / "config.json", as_json(self.stored))
        self.console.print(f"{dataset} -> {folder}")
        try:
            yield
        except Interrupted:
            quoted = shlex.quote(str(folder))
            self.console.print(f"stopped; go on with the same options and: --out {quoted} --resume")
            raise

    def kept(self, path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a finished phase left in ``path``, else what ``make`` makes, which is written there."""
        kind = f"{self.method} {path.stem}"
        if not path.exists():
            began = time.monotonic()
            write_safetensors(path, make(), kind, self.stored)
            self.console.print(f"{path.stem}: {time.monotonic() - began:.0f} s")
        return read_safetensors(path, kind)[0]

    def checkpoint(self, path: Path) -> dict[str, Tensor] | None:
        kind = f"{self.method} {path.stem}"
        return read_safetensors(path, kind)[0] if path.exists() else None

    def write_checkpoint(self, path: Path, state: dict[str, Tensor]) -> None:
        write_safetensors(path, state, f"{self.method} {path.stem}", self.stored)


def keep_iterations(metrics: Path, done: int) -> None:
    """Drops what a run that was cut off had written of iterations after its last checkpoint."""
    keep_lines(metrics, lambda record: record["iteration"] <= done)
