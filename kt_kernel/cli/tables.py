"""Tables as plain text: never wider than a terminal, and the same when written into a file."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 80
_GAP = 2
_NARROWEST = 16


def columns() -> int:
    """Of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def wrapped_rows(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> Iterator[str]:
    """Lines of a table with a head: columns as wide as needed; the last takes what is left and is wrapped.

    Where the others leave less than 16 columns, the text of the last goes to lines of its own.
    """
    table = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    indent = sum(widths) + _GAP * len(widths)
    if width - indent < _NARROWEST:
        yield from _stacked(table, widths, width)
        return
    for row in table:
        start = "".join(f"{cell:{size + _GAP}}" for cell, size in zip(row, widths, strict=False))
        lines = _wrap(row[-1], width - indent)
        yield (start + lines[0]).rstrip()
        yield from (" " * indent + line for line in lines[1:])


def _stacked(table: list[list[str]], widths: list[int], width: int) -> Iterator[str]:
    """The first columns, one below the other where they are too long, and the last indented below them."""
    fits = sum(widths) + _GAP * len(widths) <= width
    for row in table:
        if fits:
            yield "".join(f"{cell:{size + _GAP}}" for cell, size in zip(row, widths, strict=False)).rstrip()
        else:
            yield from (line for cell in row[:-1] for line in _wrap(cell, width))
        yield from (f"    {line}" for line in _wrap(row[-1], width - 4))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table of figures: the first column left, all others right; as wide as it needs to be."""
    table = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for first, *others in table:
        cells = [f"{cell:>{size}}" for cell, size in zip(others, widths[1:], strict=True)]
        yield (" " * _GAP).join([f"{first:{widths[0]}}", *cells]).rstrip()
