"""What the user types: with prompt_toolkit in a terminal, line by line from anything else.

A question may have several lines: Alt-Enter begins a new one, and so does Enter where the line ends in a
backslash or where a block that began with three quotes has not ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from kt_kernel.cli.conversation.commands import COMMANDS

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

QUOTES = '"""'
PROMPT = "> "
_MORE = ". "

Reader = Callable[[], str]
"""The next question, as typed. Raises EOFError at the end of input, KeyboardInterrupt for Ctrl-C."""


def is_unfinished(text: str) -> bool:
    """Whether Enter after `text` begins a new line."""
    if text.lstrip().startswith(QUOTES):
        return text.count(QUOTES) < 2
    return text.endswith("\\")


def joined(text: str) -> str:
    """The question in what was typed: without the quotes around a block or the backslashes at line ends."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n").strip()


def reader() -> Reader:
    """For this process's input."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        session = terminal_session()
        return lambda: session.prompt(PROMPT)
    return _lines


def terminal_session() -> PromptSession:
    """Editing, history (this conversation's only), completion of commands, several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        prompt_continuation=_MORE,
    )


def _lines() -> str:
    text = _line(PROMPT)
    while is_unfinished(text):
        text += "\n" + _line(_MORE)
    return text


def _line(prompt: str) -> str:
    if sys.stdin.isatty():  # standard output is a file then, which is for the answers
        typer.echo(prompt, nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
