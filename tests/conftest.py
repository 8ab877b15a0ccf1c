"""What tests of every folder share: `import cuda_packages` finds the module beside this file.

./install.sh test runs two processes of tests at a time. Tests marked `alone` measure time or idleness, and
run while the other process waits between two of its own.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

import hypothesis
import pytest

HERE = Path(__file__)
# The same examples in every run, however busy the machine.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Lets tests take turns across the processes of one run.

    Not in a pytest that a test starts: it is a part of that test's turn, and would wait for its own end.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    kind = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    # These files are here already and can be locked. Whoever waits for its turn lets nobody else begin.
    with HERE.open() as turn, HERE.with_name("requirements.lock").open() as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(turn, kind)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


def pytest_terminal_summary(terminalreporter):
    """Lists what this machine could not run, and why."""
    reasons = {
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    }
    not_run = sorted(reason for reason in reasons if reason.startswith("NOT RUN"))
    if not_run:
        terminalreporter.section("kernels this machine could not test", yellow=True)
        for reason in not_run:
            terminalreporter.line(reason)
