"""A small data set, and a teacher squeezed on it."""

import pytest
import torch

from pydistill.methods.decoupled.squeeze import squeeze
from tests.bars import make_dataset
from tests.methods.teachers import SQUEEZE


@pytest.fixture(scope="module")
def data():
    return make_dataset()


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    return squeeze(SQUEEZE, data)
