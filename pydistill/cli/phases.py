"""What the methods share that make more than a set: a folder of phases, each of which leaves a file."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import rich.console
import tyro
from torch import Tensor

from pydistill.cli.console import Interrupted, Stop, keep_lines
from pydistill.cli.folder import Folder
from pydistill.cli.settings import dataset_of
from pydistill.data import Dataset, read_safetensors, write_safetensors
from pydistill.methods.self_supervised import BATCH

T = TypeVar("T")


def parse(argv: list[str], name: str, command: type[T], preset: Callable[[str], Any]) -> T:
    """The options of ``distill <name>``, whose defaults are the data set's."""
    dataset = dataset_of(argv)
    return tyro.cli(
        command,
        args=argv,
        prog=f"pydistill distill {name}",
        default=command(preset(dataset), dataset),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


class Phases:
    """The folder of a run that goes on with --resume after the last phase, or checkpoint, whose file is there.

    Raises:
        ValueError: --out is not new or empty, or --resume does not fit it.
        FileNotFoundError: --resume without a run.
    """

    def __init__(self, method: str, options: Any, dataset: str, console: rich.console.Console, stop: Stop):
        self.method, self.stored, self.console, self.stop = method, options.stored(), console, stop
        self._run = Folder(options.out, f"{method}-{dataset}", f"distill {method}", resume=options.resume)
        self._run.check_same(self.stored)
        self.folder = self._run.path

    def check_encoder(self, data: Dataset) -> None:
        """ValueError where the set is too small for the self-supervised network of the first phase."""
        if (count := len(data.train_images)) < BATCH:
            raise ValueError(f"--dataset: expected at least {BATCH} training images, a batch, got {count}")

    @contextmanager
    def opened(self, dataset: str, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Makes the folder, this process's own inside the block; a run that is stopped inside says how to go on.

        ``check`` reads what is in the folder, and raises for what no run can go on with.
        """
        self.stop()
        with self._run.held():
            if check is not None:
                check()
            self._run.begin(self.stored)
            self.console.print(f"{dataset} -> {self.folder}")
            try:
                yield
            except Interrupted:
                quoted = shlex.quote(str(self.folder))
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
