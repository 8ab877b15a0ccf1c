"""The tests of this folder also use the slow decoders and references of tests/api."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "api"))


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The matrices are small, and the engine's threads need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
