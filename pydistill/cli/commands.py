"""The commands in one table, and the handling of signals and errors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import rich.console
import tyro

from pydistill import __version__
from pydistill._arguments import meant
from pydistill.cli import runs
from pydistill.cli.console import Stop, plain_console
from pydistill.cli.evaluate import Evaluate, Export
from pydistill.cli.experts import Experts
from pydistill.cli.options import by_options, parsed
from pydistill.cli.pack import Pack
from pydistill.methods import DECOUPLED, METHODS
from pydistill.methods.method import Method, OptionError
from pydistill.methods.runs import Interrupted


@dataclass(frozen=True)
class Bench:
    """Time the kernels on this machine against plain PyTorch and torch.compile: a table per case, in a few minutes."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ()
    """Cases by name; by default those most relevant to users. An unknown name lists them."""
    gpu: bool = False
    """Measure what a CUDA device does instead, into gpu.jsonl: environment, parity of every operator, the loops."""
    minutes: float | None = None
    """When to stop, with --gpu: after 7 by default."""
    resume: bool = False
    """With --gpu, leave out what has its line in gpu.jsonl."""

    def run(self) -> None:
        # installed, the benchmarks are part of the package; in a checkout, a separate folder beside it
        folder = "pydistill.bench" if importlib.util.find_spec("pydistill.bench") is not None else "bench"
        if not self.gpu and (self.resume or self.minutes is not None):
            raise ValueError("--minutes, --resume: expected with --gpu only")
        if self.gpu:
            program = importlib.import_module(f"{folder}.gpu.__main__")
            minutes = [] if self.minutes is None else ["--minutes", str(self.minutes)]
            sys.exit(program.main([*self.cases, *minutes, *(["--resume"] if self.resume else [])]))
        sys.exit(importlib.import_module(f"{folder}.run").brief(self.cases))


def _with_options(command: type[Any], name: str, argv: list[str], *given: Any) -> None:
    """Runs a command whose options are its fields."""
    made = parsed(command, name, argv)
    with by_options(made):
        made.run(*given)


@dataclass(frozen=True)
class Command:
    """What runs if a command line begins with ``words``; it is called with the arguments after them."""

    words: str
    about: str  # its line in the overview
    run: Callable[[list[str], rich.console.Console, Stop], None]
    stops: bool = True  # handles signals itself, stopping cleanly


def _of(group: str) -> list[type[Method]]:
    return [method for method in METHODS.values() if method.group == group and method.name not in DECOUPLED]


def _distilling(group: str) -> tuple[Command, ...]:
    def command(method: type[Method]) -> Command:
        about = f"{method.about} ({method.paper})"
        return Command(f"distill {method.name}", about, lambda argv, *more: runs.distill([method.name, *argv], *more))

    return tuple(command(method) for method in _of(group))


COMMANDS: dict[str, tuple[Command, ...]] = {
    "Distil a data set into images": (
        *_distilling("images"),
        Command("distill", "what is first of these: distill mtt", runs.distill),
        Command(
            "experts",
            "train the experts that trajectories are matched to, or make them of replay buffers",
            lambda argv, console, stop: _with_options(Experts, "experts", argv, console, stop),
        ),
    ),
    f"The decoupled methods ({', '.join(DECOUPLED)}), step by step": (
        *(Command(m.name, m.about, partial(runs.step, m.name)) for m in _of("decoupled")[:1]),
        Command("recover", "make images that fit the network's statistics", partial(runs.step, "recover")),
        *(Command(m.name, m.about, partial(runs.step, m.name)) for m in _of("decoupled")[1:]),
    ),
    "Pick real images": tuple(
        Command(f"select {m.name}", f"{m.about} ({m.paper})", partial(runs.select, m.name)) for m in _of("selection")
    ),
    "Distil a network": _distilling("networks"),
    "Prepare a data set": (
        Command(
            "pack",
            "resize and decode its pictures once, into one file that every --root takes",
            lambda argv, console, stop: _with_options(Pack, "pack", argv, console, stop),
        ),
    ),
    "Use the results": (
        Command(
            "evaluate",
            "train fresh students on a distilled file and test them, a row for each architecture",
            lambda argv, console, stop: _with_options(Evaluate, "evaluate", argv, console, stop),
        ),
        Command(
            "export",
            "write images.pt, labels.pt and lr.pt, as the method repositories and DD-Ranking read them",
            lambda argv, console, stop: _with_options(Export, "export", argv, console),
        ),
        Command(
            "bench",
            "time the kernels on this machine beside plain PyTorch and torch.compile",
            lambda argv, console, stop: _with_options(Bench, "bench", argv),
            stops=False,
        ),
    ),
}


def overview(word: str = "") -> str:
    """The commands, or those that begin with ``word``, in groups, one or two lines each."""
    lines = [
        f"usage: pydistill {word or 'COMMAND'} [OPTIONS]",
        "",
        "Dataset distillation from the command line. `pydistill COMMAND --help` has a command's options, after",
        "`distill METHOD` the method's. What is cut off goes on with --resume. The exit status is 2 if options or",
        "files are refused (a line says which, what was expected, what came), 1 if work failed, 130 after a signal.",
    ]
    for group, commands in COMMANDS.items():
        entries = [
            textwrap.fill(command.about, 100, initial_indent=f"  {command.words:<17}", subsequent_indent=19 * " ")
            for command in commands
            if command.words.split()[0] == word or not word
        ]
        lines += ["", group, *entries] if entries else []
    return "\n".join([*lines, "", "python -m pydistill.info says which kernels this installation has."])


def _chosen(argv: Sequence[str]) -> tuple[Command, list[str]]:
    """The command with the most words that ``argv`` begins with, and what follows."""
    commands = sorted((c for group in COMMANDS.values() for c in group), key=lambda c: -len(c.words.split()))
    for command in commands:
        words = command.words.split()
        if list(argv[: len(words)]) == words:
            return command, list(argv[len(words) :])
    firsts = sorted({command.words.split()[0] for command in commands})
    count = 2 if argv[0] in firsts else 1
    known = firsts if count == 1 else sorted(c.words for c in commands if c.words.split()[0] == argv[0])
    got = " ".join(argv[:count])
    raise ValueError(f"expected one of {', '.join(known)}, got {got!r}{meant(got, known)}")


def _failed(message: object, status: int) -> NoReturn:
    print(f"pydistill: {message}", file=sys.stderr)
    sys.exit(status)


def run(argv: list[str]) -> None:
    """Runs the command in ``argv``; exits as ``main`` does."""
    console, helps = plain_console(), ("-h", "--help")
    try:
        if not argv:
            print(overview(), file=sys.stderr)
            sys.exit(2)
        if argv[0] == "--version":
            print(__version__, flush=True)
        elif argv[0] in helps or (argv[0] == "select" and argv[1:2] and argv[1] in helps):  # not a command itself
            print(overview("" if argv[0] in helps else argv[0]), flush=True)
        else:
            command, rest = _chosen(argv)
            with Stop().installed() if command.stops else nullcontext(Stop()) as stop:
                command.run(rest, console, stop)
    except Interrupted:
        sys.exit(130)
    except OptionError as error:
        _failed(f"--{error.option.replace('_', '-')}: {error.reason}", 2)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _failed(error, 2)
    except (RuntimeError, OSError, FloatingPointError) as error:
        _failed(error, 1)
