"""`python -m bench.gpu --minutes 7`, from the package `pydistill bench --gpu`: everything that needs a real GPU.

Environment and ceilings; each operator on each backend that loads, against the CPU in float64; the exact trajectory
gradient beside the eager loop, with what it asks of the driver; peak memory; one torch.compile; then the other loops.
A line of JSON for each, at once; a table at the end. Times are of the device's own clock. Items run in another process,
which is ended and started anew where one hangs, dies or loses the device.

Exit status: 1 if an item is wrong, fails or dies; 2 if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .items import items
from .session import leave, lines_in, run_items, summary, supervise


def run_here(names: Sequence[str], out: Path, minutes: float, stacks: Path, tiny: bool) -> None:
    """What a process of the items does."""
    with stacks.open("a") as file:
        faulthandler.enable(file)
        leave(run_items([item for item in items() if item.name in names], out, minutes, tiny=tiny, stacks=stacks))


def main(arguments: Sequence[str] | None = None) -> int:
    known = {item.name: item for item in items()}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("items", nargs="*", help=f"any of {', '.join(known)}; all without a name")
    parser.add_argument("--minutes", type=float, default=7.0, help="when to stop; 7 by default")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file of the results, appended to")
    parser.add_argument("--resume", action="store_true", help="leave out what has its line in --out")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    options = parser.parse_args(arguments)
    refusal = None
    if unknown := set(options.items) - set(known):
        refusal = f"no item {', '.join(sorted(unknown))}; there are {', '.join(known)}"
    elif not torch.cuda.is_available():
        refusal = f"no CUDA device is visible to torch {torch.__version__}, so nothing was run"
    elif not options.resume and lines_in(options.out):
        refusal = f"--out: {options.out} has results; --resume goes on with them"
    if refusal is not None:
        print(f"bench.gpu: {refusal}", file=sys.stderr)
        return 2

    chosen = [name for name in known if not options.items or name in options.items]
    supervise(run_here, chosen, options.out, options.minutes, tiny=options.tiny)
    lines = lines_in(options.out)
    print(summary(lines))
    return int(any(line["status"] in ("wrong", "failed", "died") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
