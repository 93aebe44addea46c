"""Benchmarks: `python -m bench.run`, then `python -m bench.plot`, from the repository root."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the source tree first on the path, where it would hide an installed pydistill (the compiled libraries
# lie beside the installed one). Last on the path it still serves `bench` itself.
for entry in ("", str(ROOT)):
    while entry in sys.path:
        sys.path.remove(entry)
sys.path.append(str(ROOT))
