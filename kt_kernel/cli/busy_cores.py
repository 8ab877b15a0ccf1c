"""Are other programs computing on the cores that this process may use?"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

_SECONDS = 0.3
_WORTH_A_WORD = 0.2  # of one core; a desktop's own programs take less

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # fields of a line of /proc/stat: idle, and waiting for a disk

Ticks = Mapping[int, tuple[int, int]]
"""CPU -> (ticks busy, ticks in all) since the machine started."""


def warning() -> str:
    """One sentence if they are busy, else ""; this process must not compute meanwhile."""
    before = read_ticks(_STAT.read_text())
    time.sleep(_SECONDS)
    cpus = os.sched_getaffinity(0)
    busy = busy_cores(before, read_ticks(_STAT.read_text()), cpus)
    if busy < _WORTH_A_WORD:
        return ""
    return (
        f"other programs keep {busy:.1f} of {len(cpus)} cores busy: all figures will be lower than what this "
        "machine can do"
    )


def read_ticks(stat: str) -> Ticks:
    """Of /proc/stat's lines "cpu0 user nice system idle iowait ..."."""
    ticks = {}
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            # The last two, guests, are counted in the first two already.
            numbers = [int(field) for field in fields[:8]]
            total = sum(numbers)
            ticks[int(name.removeprefix("cpu"))] = (total - sum(numbers[i] for i in _IDLE), total)
    return ticks


def busy_cores(before: Ticks, after: Ticks, cpus: set[int]) -> float:
    """How many of `cpus` were busy between the two, 1.5 for one and a half."""
    shares = []
    for cpu in cpus & before.keys() & after.keys():
        busy, total = (late - early for early, late in zip(before[cpu], after[cpu], strict=True))
        shares.append(busy / total if total > 0 else 0.0)
    return sum(shares)
