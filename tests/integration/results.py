"""What a benchmark wrote."""

from __future__ import annotations

import csv
from pathlib import Path


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
