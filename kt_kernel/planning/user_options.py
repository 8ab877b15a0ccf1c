"""What the user already decided: options behind the model of `kt run`, as SGLang's argparse reads them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# Other spellings of an option that SGLang takes.
ALIASES = {
    "--model-path": ("--model",),
    "--tp-size": ("--tensor-parallel-size", "--tp"),
    "--pp-size": ("--pipeline-parallel-size",),
    "--dp-size": ("--data-parallel-size",),
}


def last_value(options: Sequence[str], flag: str) -> str | None:
    """The value that argparse would take for `flag`: the last one given."""
    value = None
    for position, option in enumerate(options):
        if matches(option, flag):
            _, equals, joined = option.partition("=")
            value = joined if equals else next(iter(options[position + 1 :]), None)
    return value


def given(options: Sequence[str], flag: str) -> bool:
    """Is `flag` there, in any spelling?"""
    return any(matches(option, flag) for option in options)


def matches(option: str, flag: str) -> bool:
    """Is this word of a command line `flag`, with or without its value?"""
    names = (flag, *ALIASES.get(flag, ()))
    return any(option == name or option.startswith(name + "=") for name in names)


@dataclass(frozen=True)
class UserOptions:
    """The words of the command line behind the model."""

    words: tuple[str, ...] = ()

    def has(self, flag: str) -> bool:
        return given(self.words, flag)

    def text(self, flag: str) -> str | None:
        return last_value(self.words, flag)

    def values(self, flag: str) -> tuple[str, ...]:
        """Of an option that takes several words: those behind the last `flag`, up to the next option."""
        found: tuple[str, ...] = ()
        for position, word in enumerate(self.words):
            if matches(word, flag):
                _, equals, joined = word.partition("=")
                behind = itertools.takewhile(lambda w: not w.startswith("-"), self.words[position + 1 :])
                found = (joined,) if equals else tuple(behind)
        return found

    def integer(self, flag: str) -> int | None:
        """None if it is not given; or is no integer: the server will say so."""
        value = self.text(flag)
        try:
            return None if value is None else int(value)
        except ValueError:
            return None

    def share(self, flag: str) -> float | None:
        """As `integer`, of a number with a point."""
        value = self.text(flag)
        try:
            return None if value is None else float(value)
        except ValueError:
            return None
