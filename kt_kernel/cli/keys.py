"""Single keys of a terminal, without waiting for Enter."""

from __future__ import annotations

import os
import re
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


_ONE_KEY = re.compile("\033\\[[0-9;]*[A-Za-z~]|\033O[A-Z]|.", re.DOTALL)


def names_of(typed: str) -> list[str]:
    """Of what a terminal sends for some keys, which may come together."""
    return [_SEQUENCES.get(key, key) for key in _ONE_KEY.findall(typed)]


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
        pending: list[str] = []
        yield lambda seconds: _next_key(terminal, pending, seconds)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _next_key(terminal: int, pending: list[str], seconds: float) -> str:
    if not pending:
        ready, _, _ = select.select([terminal], [], [], max(seconds, 0))
        if not ready:
            return ""
        # The bytes of one key come together.
        pending += names_of(os.read(terminal, 1024).decode(errors="replace"))
    return pending.pop(0) if pending else ""


def _no_keys(seconds: float) -> str:
    time.sleep(max(seconds, 0))
    return ""
