"""A finished run for the command line's tests, and one thread for the benchmarks'."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small uninterrupted run."""
    from tests.integration.commands import SMALL, run

    folder = tmp_path_factory.mktemp("finished") / "run"
    code, output = run("distill", *SMALL, "--out", folder)
    assert code == 0, output
    return folder, output


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # at these sizes a thread pool on a busy machine mostly waits at its barriers
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
