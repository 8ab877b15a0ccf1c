"""Damaged files end in an answer or a sentence, and cost no more memory than they are long."""

import pytest
from fuzz_reader import run


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused(tmp_path, seed):
    outcomes = run(range(1000 * seed, 1000 * seed + 1000), tmp_path)
    assert (
        outcomes["CheckpointError"] > 500 and outcomes["read"] > 20
    )  # damage that nothing sees tests nothing
