"""Runs the server as a child in a session of its own, and ends all of it when asked.

A terminal sends Ctrl-C to every process of its foreground group; SGLang's scheduler would die of it with a
traceback, and the main process would take that for a crash.  In its own session the server hears only the
SIGTERM that we send to its main process, upon which it finishes cleanly.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
from types import FrameType
from typing import TextIO

from kt_kernel import server_files

log = logging.getLogger(__name__)

GRACE_SECONDS = 15  # SGLang first finishes the running requests; an idle server ends in 2 to 5 s
_PR_SET_PDEATHSIG = 1


def run_until_stopped(command: list[str], environment: dict[str, str], output: TextIO | None = None) -> int:
    """Run the server; returns its exit status, or 0 if it ended because this process was asked to stop.

    What it prints goes to `output`, a file of the system, or where this process prints.

    SIGINT, SIGTERM and SIGHUP ask.  A second one, or `GRACE_SECONDS` after the first, kills what is left.  If
    this process is killed itself, the server is told to end.
    """
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    server = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    stop_requested = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop_requested
        if stop_requested:
            _kill_session(server.pid)
            return
        stop_requested = True
        log.info("stopping the server; Ctrl-C again kills it")
        server.terminate()
        signal.alarm(GRACE_SECONDS)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        # Also where SIGINT was ignored, as it is in the background jobs of scripts: one can still send it.
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: to outlive the terminal
        signal.signal(signal.SIGHUP, stop)
    status = server.wait()
    signal.alarm(0)
    _kill_session(server.pid)  # children that outlived the main process
    server_files.sweep()
    if stop_requested:
        return 0
    return status if status >= 0 else 128 - status


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
