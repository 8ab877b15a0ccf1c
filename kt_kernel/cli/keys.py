"""Single keys of a terminal, without waiting for Enter."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UP, DOWN, PAGE_UP, PAGE_DOWN = "up", "down", "page up", "page down"
_SEQUENCES = {
    "\033[A": UP,
    "\033OA": UP,
    "\033[B": DOWN,
    "\033OB": DOWN,
    "\033[5~": PAGE_UP,
    "\033[6~": PAGE_DOWN,
    "k": UP,
    "j": DOWN,
    " ": PAGE_DOWN,
    "b": PAGE_UP,
}

Wait = Callable[[float], str]
"""Waits so many seconds at most; returns the key that was pressed meanwhile (a name from above or a
character), "" if none was."""


def name_of(typed: str) -> str:
    """Of what a terminal sends for one key."""
    return _SEQUENCES.get(typed, typed)


@contextmanager
def pressed_keys() -> Iterator[Wait]:
    """Keys of standard input while the context lasts; where that is no terminal, there are none."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield lambda seconds: _key(terminal, seconds)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _key(terminal: int, seconds: float) -> str:
    ready, _, _ = select.select([terminal], [], [], max(seconds, 0))
    # The bytes of one key come together; a person is slower than this reading.
    return name_of(os.read(terminal, 16).decode(errors="replace")) if ready else ""


def _no_keys(seconds: float) -> str:
    time.sleep(max(seconds, 0))
    return ""
