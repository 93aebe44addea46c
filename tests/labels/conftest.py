"""A label store without a file yet, and one with all its labels."""

import pytest

from tests.labels.stores import create, fill


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.store"


@pytest.fixture
def filled(path):
    with create(path) as store:
        fill(store)
    return path
