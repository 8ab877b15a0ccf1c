"""The tests of this folder also use the slow decoders and references of tests/api."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The matrices are small, and the engine's threads need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
