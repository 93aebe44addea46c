"""The subcommands, and what becomes of signals and errors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from pydistill.cli import decoupled
from pydistill.cli.console import Interrupted, Stop, plain_console
from pydistill.cli.distill import Distill, Run
from pydistill.cli.evaluate import Evaluate, Export
from pydistill.cli.experts import Experts
from pydistill.cli.hello import run as run_hello
from pydistill.cli.krr_st import run as run_krr_st
from pydistill.cli.select import run as run_select
from pydistill.cli.unip import run as run_unip

# commands with options and phases of their own: what runs them, and where the arguments begin that it sees
_OWN = {
    ("distill", "unip"): (run_unip, 2),
    ("distill", "hello"): (run_hello, 2),
    ("distill", "krr_st"): (run_krr_st, 2),
    ("select",): (run_select, 1),
    **{(name,): (decoupled.run, 0) for name in decoupled.COMMANDS},
}


@dataclass(frozen=True)
class Bench:
    """Time the kernels on this machine beside plain PyTorch and torch.compile: a table per case, in a few minutes."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ()
    """Cases by name; without any, those that a user would decide by. An unknown name lists them."""

    def run(self) -> int:
        # installed, the benchmarks are a part of the package; in a checkout, a folder of their own beside it
        installed = importlib.util.find_spec("pydistill.bench") is not None
        return importlib.import_module("pydistill.bench.run" if installed else "bench.run").brief(self.cases)


def run(argv: list[str], description: str) -> None:
    """Parses ``argv`` and does what it says; exits as ``main`` does."""
    console = plain_console()
    try:
        for words, (command, rest) in _OWN.items():
            if tuple(argv[: len(words)]) == words:
                with Stop().installed() as stop:
                    command(argv[rest:], console, stop)
                return
        default = Distill.default_for(argv[1:] if argv[:1] == ["distill"] else [])
        command = tyro.cli(
            Annotated[Distill, tyro.conf.subcommand("distill", default=default)]
            | Annotated[Experts, tyro.conf.subcommand("experts")]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Export, tyro.conf.subcommand("export")]
            | Annotated[Bench, tyro.conf.subcommand("bench")],
            args=argv,
            prog="pydistill",
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(command, Bench):
            sys.exit(command.run())
        with Stop().installed() as stop:
            if isinstance(command, Distill):
                Run(command, console, stop).go(default)
            elif isinstance(command, Export):
                command.run(console)
            else:
                command.run(console, stop)
    except Interrupted:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"pydistill: {error}", file=sys.stderr)
        sys.exit(1)
