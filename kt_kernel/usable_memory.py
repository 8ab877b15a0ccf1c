"""Main memory that this process may use, for plans and for the server that follows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_memory() -> tuple[int, int]:
    """Bytes in total and available: of the machine, or of the tightest control group of this process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for group in _own_groups():
        limit = _number(group / "memory.max")
        if limit is None:
            continue
        used = (_number(group / "memory.current") or 0) - _file_cache(group)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _own_groups() -> Iterator[Path]:
    """The control group of this process and those above it, as version 2 shows them."""
    try:
        line = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
    except (OSError, StopIteration):
        return
    own = Path(line.removeprefix("0::"))
    for group in (own, *own.parents):
        yield _CGROUPS / str(group).lstrip("/")


def _file_cache(group: Path) -> int:
    """What the kernel can drop: files that were read."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
