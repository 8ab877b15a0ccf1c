"""How an answer looks: in a terminal reasoning and times are dim; in a file the answer stands alone.

Where standard output is no terminal, reasoning is set off by lines of its own, and the times go to standard
error.
"""

from __future__ import annotations

import os
import sys

import typer

_DIM, _NORMAL = "\033[2m", "\033[0m"


class TerminalScreen:
    """For a person."""

    def __init__(self) -> None:
        self._dimmed = False
        self._begun = False

    def reasoning(self, text: str) -> None:
        """Dim."""
        self._write(text if self._dimmed else _DIM + text)
        self._dimmed = True

    def content(self, text: str) -> None:
        """Below the reasoning, if there was any."""
        self._write(f"{_NORMAL}\n\n{text.lstrip()}" if self._dimmed else text)
        self._dimmed = False

    def end(self, times: str) -> None:
        """A dim line of the answer's times."""
        self._write(f"{_NORMAL}\n{_DIM}[{times}]{_NORMAL}\n")
        self._dimmed = False

    def break_off(self) -> None:
        """Where the answer ended too early, ordinary letters and a new line."""
        if self._begun:
            self._write(f"{_NORMAL}\n")

    def _write(self, text: str) -> None:
        self._begun = True
        sys.stdout.write(text)
        sys.stdout.flush()


class PlainScreen:
    """For a file or a pipe: no control codes."""

    def __init__(self) -> None:
        self._reasons = False
        self._begun = False

    def reasoning(self, text: str) -> None:
        """Below a line that says so."""
        self._write(text if self._reasons else f"[reasoning]\n{text}")
        self._reasons = True

    def content(self, text: str) -> None:
        """Below the reasoning, if there was any."""
        self._write(f"\n[answer]\n{text.lstrip()}" if self._reasons else text)
        self._reasons = False

    def end(self, times: str) -> None:
        """The end of the line; times on standard error."""
        self._write("\n")
        self._reasons = False
        typer.echo(f"[{times}]", err=True)

    def break_off(self) -> None:
        """Where the answer ended too early, a new line."""
        if self._begun:
            self._write("\n")

    def _write(self, text: str) -> None:
        self._begun = True
        sys.stdout.write(text)
        sys.stdout.flush()


def screen() -> TerminalScreen | PlainScreen:
    """For this process's output; NO_COLOR asks for a plain one."""
    return TerminalScreen() if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else PlainScreen()
