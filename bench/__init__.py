"""Benchmarks: `python -m bench.run`, then `python -m bench.plot`, from the repository root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
