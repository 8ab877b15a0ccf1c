"""What the end of one of a server's processes means, in a sentence. Stock SGLang 0.5.23 tells the exit code
alone, and names the out-of-memory killer whatever it is.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"
_LEAST_FREE = 1 << 20  # bytes of it; a process of the server takes some hundred kilobytes


def meaning(exit_code: int | None) -> str:
    """How a process ended, why that may be, and what to do."""
    if exit_code is None:
        return "it does not answer"
    if exit_code >= 0:
        return f"exit code {exit_code}; its own lines in the log say why"
    return f"exit code {exit_code}, {_signal_name(-exit_code)}: {_REASONS.get(-exit_code, _unknown)()}"


def tell_at_start(error: RuntimeError, rank: int, process: Any) -> RuntimeError:
    """After `_scheduler_died_error`."""
    return RuntimeError(f"the scheduler of rank {rank} ended while it started ({meaning(process.exitcode)}).")


def tell(watchdog: Any) -> None:
    """Before `SubprocessWatchdog._check_processes`, which ends the server when a process has ended."""
    for process, name in zip(watchdog._processes, watchdog._names, strict=True):
        if not process.is_alive() and process.exitcode:
            logger.critical(
                "error: the process %s of this server ended (%s).", name, meaning(process.exitcode)
            )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _killed() -> str:
    return "somebody killed it, or the system did because memory ran out (dmesg says so)"


def _bad_page() -> str:
    if _free_shared_memory() < _LEAST_FREE:
        return f"{_SHARED_MEMORY} is full; remove what is not used, or give the container more (--shm-size)"
    return f"a file that it had mapped was cut off, or {_SHARED_MEMORY} was full"


def _free_shared_memory() -> int:
    """Bytes."""
    try:
        free = os.statvfs(_SHARED_MEMORY)
    except OSError:  # some containers have none
        return 0
    return free.f_bavail * free.f_frsize


def _crashed() -> str:
    return "it crashed; please report its last lines in the log"


def _unknown() -> str:
    return "somebody sent it this signal"


_REASONS: dict[int, Callable[[], str]] = {
    signal.SIGKILL: _killed,
    signal.SIGBUS: _bad_page,
    **dict.fromkeys((signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE), _crashed),
}
