"""Programs that some tests need. CI has them all; elsewhere a missing one skips a test and says so."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, *others: str) -> str:
    """Path of the first of these programs found beside this interpreter or on PATH.

    Without any: fails the test when the variable CI is set, skips it otherwise.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for candidate in (name, *others):
        if found := shutil.which(candidate, path=path):
            return found
    reason = f"NOT RUN: this test needs the program {name}, which is not installed here"
    if os.environ.get("CI"):
        pytest.fail(reason + "; CI must have it")
    pytest.skip(reason)
