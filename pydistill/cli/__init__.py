"""Dataset distillation from the command line; `pydistill --help` has the commands."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from pydistill._library import isa_error

__all__ = ["main"]

_PACKAGES = {"tyro": "tyro", "rich": "rich", "PIL": "pillow", "psutil": "psutil"}


def main(argv: Sequence[str] | None = None) -> None:
    """The console command ``pydistill``; exits with 0, 1 if the work failed, 2 if ``argv`` or a file that it names is
    refused, 130 after SIGINT or SIGTERM."""
    if isa_error is not None:
        print(f"pydistill: {isa_error}", file=sys.stderr)
        sys.exit(2)
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            sys.exit(
                f"pydistill: the command line needs {package}, which is not installed: pip install 'pydistill[cli]'"
            )
    from pydistill.cli.commands import run

    run(list(sys.argv[1:] if argv is None else argv))
