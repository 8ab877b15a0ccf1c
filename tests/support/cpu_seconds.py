"""A plug-in for pytest: what each module of tests costs in CPU time, whatever else the machine does.

PYTHONPATH=tests/support KT_TEST_CPU=seconds.txt ./install.sh test -p cpu_seconds
python tests/support/cpu_seconds.py seconds.txt        the modules, longest first

CPU time is that of the process and of the children it has waited for: of a server only the launching process,
of a fork of warm_interpreter.py nothing. So the wall clock stands beside it.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest


def _cpu() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """One line per test: CPU seconds, seconds, name. Short lines are appended whole by several processes."""
    began, cpu = time.monotonic(), _cpu()
    try:
        return (yield)
    finally:
        if file := os.environ.get("KT_TEST_CPU"):
            with open(file, "a") as lines:
                lines.write(f"{_cpu() - cpu:.3f} {time.monotonic() - began:.3f} {item.nodeid}\n")


def main(file: str) -> None:
    cpu: Counter[str] = Counter()
    wall: Counter[str] = Counter()
    for line in Path(file).read_text().splitlines():
        one, other, name = line.split(" ", 2)
        module = name.partition("::")[0]
        cpu[module] += float(one)
        wall[module] += float(other)
    for module, seconds in sorted(cpu.items(), key=lambda row: -max(row[1], wall[row[0]])):
        print(f"{seconds:8.1f} {wall[module]:8.1f}  {module}")
    print(f"{cpu.total():8.1f} {wall.total():8.1f}  in all: CPU seconds, seconds")


if __name__ == "__main__":
    main(sys.argv[1])
