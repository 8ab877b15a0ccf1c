"""Risk: the AMX that stands in for a CPU's in tests (trapped_amx.py) multiplies otherwise than a CPU.

The same checks (amx_instructions.py) on both, as far as this machine has them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trapped_amx
from extension import ext
from isolation import python


def run_checks(**environment: str) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "amx_instructions.py", **environment)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_trapped_instructions_mean_what_the_manual_says(trapped):
    run_checks(**trapped)


@pytest.mark.skipif(
    not trapped_amx.detected() >= trapped_amx.FEATURES,
    reason="NOT RUN: the definitions of AMX on a CPU: this one has none",
)
def test_the_cpu_means_the_same():
    run_checks()


def test_only_questions_to_the_cpu_differ_from_the_installed_extension(tmp_path):
    installed = Path(ext.__file__)
    copy = trapped_amx.trapping_copy(installed, tmp_path / "copy.so")
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (installed, copy))
    places = np.flatnonzero(before != after)
    questions = [bytes(before[at : at + 2]) for at in places]
    assert questions.count(b"\x0f\x01") == 1, "one XGETBV"
    assert set(questions) == {b"\x0f\x01", b"\x0f\xa2"}
    assert (after[places] == 0x27).all()
