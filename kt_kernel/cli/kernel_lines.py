"""The extension's dispatch table in 80 columns: what this CPU takes, or every row with its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

COLUMNS = 80

_NONE = "-"


def summary_lines(rows: Sequence[dict]) -> Iterator[str]:
    """One line per method: the activations that "auto" is, their kernel, and that of the other kind."""
    yield f"{'method':16}{'auto is':9}{'its kernel':26}other activations"
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        chosen = next((row for row in of_method if row["state"] == "chosen"), None)
        if chosen is None:
            yield f"{method:16}{_NONE:9}no kernel for this CPU"
            continue
        other = _first_possible(row for row in of_method if row["activations"] != chosen["activations"])
        yield f"{method:16}{chosen['activations']:9}{chosen['kernel']:26}{other}"


def _first_possible(rows: Iterator[dict]) -> str:
    row = next((row for row in rows if row["state"] != "unavailable"), None)
    return _NONE if row is None else f"{row['activations']}: {row['kernel']}"


def detail_lines(rows: Sequence[dict]) -> Iterator[str]:
    """Every kernel, the one tried first on top, with its state and reason; methods may share them."""
    methods: dict[tuple, list[str]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        lines = tuple(line for row in rows if row["method"] == method for line in _row_lines(row))
        methods.setdefault(lines, []).append(method)
    for lines, names in methods.items():
        yield from textwrap.wrap(", ".join(names), COLUMNS)
        yield from lines


def _row_lines(row: dict) -> list[str]:
    head = f"  {row['state']:12}{row['kernel']:24}"
    facts = (row["reason"], f"needs {' '.join(row['needs'])}", row["machines"])
    rest = f"{row['activations']} activations; {'; '.join(facts)}"
    return textwrap.wrap(head + rest, COLUMNS, subsequent_indent=" " * 38, break_on_hyphens=False)
