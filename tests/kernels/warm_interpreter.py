"""An interpreter that has imported what takes two seconds, and forks for each call that it is asked for.

    WarmInterpreter(environment).call("test_queue", "leave_with_tasks_queued", [], output, timeout)

The child reads the environment that the interpreter was started with, imports the module, calls the function
and ends as any program does. No thread of ours runs where it is forked: for all that happens after the
imports it is as good as a new process. (AMD Zen 4 VM, 2 cores, 2026-11-30: 2.2 s of CPU for a new process.)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

OUT_OF_TIME = 124  # as `timeout` says it


class WarmInterpreter:
    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__],
            cwd=Path(__file__).parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, module: str, function: str, arguments: list[str], output: Path, timeout: float) -> int:
        """The exit status, negative for a signal, OUT_OF_TIME for a child that was killed.

        Both of its streams are in `output`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(
            json.dumps([module, function, arguments, str(output), timeout]),
            file=self._process.stdin,
            flush=True,
        )
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the interpreter that forks ended with status {self._process.wait()}")
        return int(answer)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """It reads the end of what it is asked, and goes."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


# ---- inside the interpreter ---------------------------------------------------------------------


def serve() -> tuple[str, str, list[str]] | None:
    """Returns in each child, with what to call; in the interpreter itself None, once nobody asks any more."""
    for line in sys.stdin:
        module, function, arguments, output, timeout = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(output)
            return module, function, arguments
        print(_ending(child, timeout), flush=True)
    return None


def _become(output: str) -> None:
    for opened, mode, number in ((os.devnull, os.O_RDONLY, 0), (output, os.O_WRONLY | os.O_CREAT, 1)):
        descriptor = os.open(opened, mode, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(1, 2)


def _ending(child: int, timeout: float) -> int:
    waiting = os.pidfd_open(child)
    in_time, _, _ = select.select([waiting], [], [], timeout)
    os.close(waiting)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if in_time else OUT_OF_TIME


if __name__ == "__main__":
    for name in ("numpy", "torch", "pytest", "kt_kernel"):
        with contextlib.suppress(ImportError):
            __import__(name)
    asked = serve()
    if asked is not None:
        import importlib

        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as every program has one; the other is the pipe's
        module, function, arguments = asked
        getattr(importlib.import_module(module), function)(*arguments)
