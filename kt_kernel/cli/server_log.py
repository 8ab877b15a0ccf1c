"""Where the server's log goes: into a file, with the lines that a person waits for on the terminal.

A server prints some 260 lines while it starts. Where nobody reads them as they come (a pipe, a container, a
unit of systemd) they are passed on as they are; KT_SERVER_LOG=terminal or file decides it by hand.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from kt_kernel.cli.errors import CommandError
from kt_kernel.user_cache import cache_root

SWITCH = "KT_SERVER_LOG"
LAST_LINES = 15  # of the log, shown when a server ends by itself: a stack trace's end and what led to it

_POLL_SECONDS = 0.2
_READY = "The server is fired up and ready to roll"
_LOADING = "Load weight begin"
# Answers to clients, and modules of SGLang for models that need packages which a CPU has no use for.
_USUAL = re.compile(r'"(GET|POST|HEAD|PUT|DELETE) \S+ HTTP/|\[http_server\] Error:|Ignore import error')
_TROUBLE = re.compile(
    r"\b(error|critical|crashed|traceback|exception|killed|out of memory)\b|\w+Error\b", re.IGNORECASE
)


def wants_file() -> bool:
    """By KT_SERVER_LOG, else: is there a person in front of a terminal?

    Raises:
        CommandError: the variable holds something else.
    """
    chosen = os.environ.get(SWITCH)
    if chosen not in (None, "", "file", "terminal"):
        raise CommandError(f"{SWITCH} is {chosen!r}, expected file or terminal")
    return sys.stderr.isatty() if not chosen else chosen == "file"


def new_log(port: str) -> tuple[Path, TextIO]:
    """An empty log for a server at `port`; what the last one there wrote is kept beside it as .1.

    Only its owner may read it: requests may be in it. A log is locked while a process of its server lives, so
    a server that is started at a taken port gets a log with a number.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_root() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([f"server-{port}.log"], (f"server-{port}-{n}.log" for n in itertools.count(2)))
    for path in map(folder.joinpath, names):
        log = _locked(path)
        if log is not None and os.fstat(log.fileno()).st_size > 0:
            with log:
                path.replace(path.with_name(path.name + ".1"))
                log = _locked(path)
        if log is not None:
            return path, log
    raise AssertionError("unreachable")


def _locked(path: Path) -> TextIO | None:
    """The file, locked by us and the processes that inherit it; None if it is another server's."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    os.fchmod(file.fileno(), 0o600)  # earlier versions let others read it
    return file


def line_for_terminal(line: str, seconds: float) -> str | None:
    """What a person should see of a line of the log, `seconds` after the start; None = nothing."""
    if _READY in line:
        return f"ready after {seconds:.0f} s"
    if _LOADING in line:
        return "loading the weights"
    if _USUAL.search(line) is None and _TROUBLE.search(line) is not None:
        return line.rstrip()
    return None


def last_lines(path: Path, count: int = LAST_LINES) -> list[str]:
    """The end of the log."""
    return path.read_text(errors="replace").splitlines()[-count:]


class Follower:
    """Reads a growing file in a thread, and hands over what a person should see of it."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self._path = path
        self._show = show
        self._ended = threading.Event()
        self._started = time.monotonic()
        self._shown: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name="kt server log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what came last, and stop."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        rest = ""
        with self._path.open(errors="replace") as file:
            while True:
                ended = self._ended.wait(_POLL_SECONDS)
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    self._look(line)
                if ended:
                    self._look(rest)
                    return

    def _look(self, line: str) -> None:
        """Every process of a server says the same; once is enough."""
        seen = line_for_terminal(line, time.monotonic() - self._started)
        if seen is not None and (key := re.sub(r"^\[[^\]]*\]\s*", "", seen)) not in self._shown:
            self._shown.add(key)
            self._show(seen)
