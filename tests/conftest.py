"""What every test gets: uninitialised memory holds NaN; random state and number of threads are as at the start."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# pytest-xdist's workers share the processor, and so do the processes that their tests start. The process that starts
# the workers sets nothing: they would inherit it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for bench; last, so that pydistill is the installed one

if find_spec("torchvision") is not None:
    from bench.networks import import_torchvision

    import_torchvision()  # its wheel on PyPI is for CUDA, and lacks its operators with a torch for the CPU


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # with deterministic algorithms torch fills what empty() returns, also for the kernels' own allocations
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    if "pydistill.ops.convnet_step" in sys.modules:  # a test's first workspace is as in a process that begins
        sys.modules["pydistill.ops.convnet_step"].Workspace._idle.clear()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    # two workers with two threads each wait for each other: tests then take ten times as long
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dataset():
    from tests.bars import make_dataset

    return make_dataset()


@pytest.fixture(scope="session")
def store(dataset, tmp_path_factory):
    """Two experts of three epochs on `dataset`."""
    from pydistill.trajectory.experts import train_experts
    from tests.bars import make_net

    path = tmp_path_factory.mktemp("experts") / "experts.store"
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3}
    return train_experts(make_net, dataset.train_images, dataset.train_labels, path, **options)


@pytest.fixture(scope="session")
def experts(store):
    return store.tensor()
