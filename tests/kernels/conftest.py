from __future__ import annotations

import pytest
from host_machine import HostMachine

from bench.kernels import build_host_launch


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostMachine:
    """The launchers, compiled by g++; a machine without g++ fails here."""
    return HostMachine(build_host_launch(tmp_path_factory.mktemp("host") / "host_launch.so"))
