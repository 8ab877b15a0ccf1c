"""The extension's dispatch table in 80 columns: what this CPU takes, or every row with its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

COLUMNS = 80

_NONE = "-"
_INDENT = "  "


def summary_lines(rows: Sequence[dict]) -> Iterator[str]:
    """One line per method: the activations that "auto" is, their kernel, and that of the other kind.

    A method with several formats has a line for those that run alike, below their names.
    """
    yield f"{'method':16}{'auto is':9}{'its kernel':28}other activations"
    for method in dict.fromkeys(row["method"] for row in rows):
        formats: dict[str, list[str]] = {}
        of_method = [row for row in rows if row["method"] == method]
        for name in dict.fromkeys(row["format"] for row in of_method):
            choice = _choice([row for row in of_method if row["format"] == name])
            formats.setdefault(choice, []).append(name)
        if list(formats.values()) == [[method]]:
            yield f"{method:16}{next(iter(formats))}"
            continue
        yield f"{method:16}by the type of each matrix:"
        for choice, names in formats.items():
            yield from textwrap.wrap(
                " ".join(names), COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT
            )
            yield f"{'':16}{choice}"


def _choice(rows: Sequence[dict]) -> str:
    """Of one format."""
    chosen = next((row for row in rows if row["state"] == "chosen"), None)
    if chosen is None:
        return f"{_NONE:9}no kernel for this CPU"
    other = _first_possible(row for row in rows if row["activations"] != chosen["activations"])
    return f"{chosen['activations']:9}{chosen['kernel']:28}{other}"


def _first_possible(rows: Iterator[dict]) -> str:
    row = next((row for row in rows if row["state"] != "unavailable"), None)
    return _NONE if row is None else f"{row['activations']}: {row['kernel']}"


def detail_lines(rows: Sequence[dict]) -> Iterator[str]:
    """Every kernel, the one tried first on top, with its state and reason; formats may share them."""
    formats: dict[tuple, list[str]] = {}
    for method, name in dict.fromkeys((row["method"], row["format"]) for row in rows):
        of_format = (row for row in rows if (row["method"], row["format"]) == (method, name))
        lines = tuple(line for row in of_format for line in _row_lines(row))
        formats.setdefault(lines, []).append(name if name == method else f"{method} {name}")
    for lines, names in formats.items():
        yield from textwrap.wrap(", ".join(names), COLUMNS)
        yield from lines


def _row_lines(row: dict) -> list[str]:
    head = f"  {row['state']:12}{row['kernel']:24}"
    facts = (row["reason"], f"needs {' '.join(row['needs'])}", row["machines"])
    rest = f"{row['activations']} activations; {'; '.join(facts)}"
    return textwrap.wrap(head + rest, COLUMNS, subsequent_indent=" " * 38, break_on_hyphens=False)
