"""Where a store of experts is made."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "experts.store"
