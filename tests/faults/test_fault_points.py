"""The points at which failures can be made on purpose: one list, and each is reached in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kt_kernel import faults, kt_kernel_ext
from kt_kernel.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def uses(folder: str, suffix: str, pattern: str) -> set[str]:
    files = (ROOT / folder).rglob(f"*{suffix}")
    return {name for file in files for name in re.findall(pattern, file.read_text())}


def test_both_languages_have_the_points_of_the_list():
    assert kt_kernel_ext.fault_points() == list(faults.IN_EXTENSION)
    camel = {"k" + "".join(word.capitalize() for word in name.split("-")) for name in faults.IN_EXTENSION}
    assert uses("csrc", ".cc", r"\bfails\(Fault::(\w+)\)") == camel
    assert uses("kt_kernel", ".py", r"\bfails\(\"([\w-]+)\"\)") == set(faults.IN_PYTHON)


def test_each_point_is_tested():
    tested = (ROOT / "tests/faults/test_each_fault.py").read_text()
    assert set(re.findall(r"[\"']([\w-]+)[\"']", tested)) >= set(faults.POINTS) - {"rank-death"}
    assert "rank-death" in (ROOT / "tests/serving/test_hybrid_server.py").read_text()


@pytest.mark.parametrize("text", ["", "disk", "allocation:", "allocation:x", "allocation:-1"])
def test_what_cannot_be_asked_for_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"KT_FAULT is '{text}', expected one of allocation, "):
        faults.asked_for(text)


def test_what_can_be():
    assert faults.asked_for("file-read") == ("file-read", 1)
    assert faults.asked_for("queue-task:12") == ("queue-task", 12)
    with pytest.raises(ConfigurationError, match="'disk' is unknown"):
        faults.arm("disk")


def test_the_nth_use_fails_once():
    faults.arm("copy-job", 3)
    assert [faults.fails("copy-job") for _ in range(5)] == [False, False, True, False, False]
    faults.arm("copy-job", 1)
    faults.arm("copy-job", 0)
    assert not faults.fails("copy-job")
