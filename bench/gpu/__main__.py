"""`python -m bench.gpu --minutes 7`, from the package `pydistill bench --gpu`: everything that needs a real GPU.

Environment and ceilings; each operator on each backend that loads, against the CPU in float64; the exact trajectory
gradient beside the eager loop, with what it asks of the driver; peak memory; one torch.compile; then the other loops.
A line of JSON for each, at once; a table at the end. Times are of the device's own clock.

Exit status: 1 if an item is wrong or fails; 2 if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .items import items
from .session import lines_in, run_items, summary


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

    def restart(minutes: float) -> None:
        again = ["--out", str(options.out), "--resume", "--minutes", str(max(minutes, 0.0)), *options.items]
        program = [sys.executable, "-m", __package__, *again, *(["--tiny"] if options.tiny else [])]
        os.execv(sys.executable, program)

    chosen = [item for name, item in known.items() if not options.items or name in options.items]
    lines = run_items(chosen, options.out, options.minutes, tiny=options.tiny, restart=restart)
    print(summary(lines))
    return int(any(line["status"] in ("wrong", "failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
