"""Other packages that ours is compared with: `pip install --no-deps` of what the extra `peers` names."""

import importlib
import os

import pytest


def peer(name):
    """The package, or the test is skipped where there is none; where all have to be there (CI) it fails."""
    if os.environ.get("PYDISTILL_REQUIRE_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: see the extra `peers` in pyproject.toml")
