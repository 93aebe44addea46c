"""The subcommands, and what becomes of signals and errors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Annotated

import rich.console
import tyro

from pydistill.cli.console import Interrupted, Stop
from pydistill.cli.distill import Distill, Run
from pydistill.cli.evaluate import Evaluate, Export
from pydistill.cli.experts import Experts
from pydistill.cli.hello import run as run_hello
from pydistill.cli.krr_st import run as run_krr_st
from pydistill.cli.unip import run as run_unip


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
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        if argv[:2] == ["distill", "unip"]:  # which makes a network, not a set: its own options, and its own phases
            with Stop().installed() as stop:
                run_unip(argv[2:], console, stop)
            return
        if argv[:1] == ["distill"] and argv[1:2] in (["hello"], ["krr_st"]):  # phases of their own, too
            with Stop().installed() as stop:
                (run_hello if argv[1] == "hello" else run_krr_st)(argv[2:], console, stop)
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
