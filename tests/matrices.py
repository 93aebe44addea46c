"""Matrices of which a part runs always, and all of it with ``pytest -m ''``."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The values for ``parametrize``, tuples for several names; those that are not ``kept`` are marked exhaustive."""
    found = list(values)
    assert all(value in found for value in kept)

    def rest(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)

    return [value if value in kept else rest(value) for value in found]
