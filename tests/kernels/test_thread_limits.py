"""Risk: threads that cannot be started are blamed on the wrong limit."""

from __future__ import annotations

import resource
from pathlib import Path

from isolation import isolated

_THREADS = 64


def without_address_space() -> None:
    """8 MiB of stack for each thread, in what a process has beside what it has mapped."""
    from api_support import loaded_wrapper, random_experts

    import kt_kernel  # noqa: F401 - mapped before the limit

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
    try:
        loaded_wrapper(random_experts(seed=1), cpuinfer_threads=_THREADS)
    except Exception as error:
        print(error)


def test_too_little_address_space_is_called_so():
    said = isolated(Path(__file__).stem, without_address_space.__name__)
    assert "cannot start CPU thread" in said and "ulimit -v" in said
    assert "allow more threads" not in said
