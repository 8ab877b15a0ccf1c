"""A benchmark's rows for machines (JSON lines) and for people (lines as they come, one table at the end)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from kt_kernel import __cpu_variant__
from kt_kernel.bench.measure import Row

GOOD, BELOW = "good", "below target"
_NO_TARGET = "-"


def verdict(rows: Sequence[Row]) -> str:
    """One word for rows of one method: below target if any row is; "-" if none has a target."""
    if all(row.target is None for row in rows):
        return _NO_TARGET
    return BELOW if any(row.misses_target for row in rows) else GOOD


def json_line(row: Row) -> str:
    """All fields of the row, the CPU variant and the verdict."""
    return json.dumps({**asdict(row), "variant": __cpu_variant__, "verdict": verdict([row])})


def text_line(row: Row) -> str:
    """One row as a line of a table without a head; other software's times come last."""
    target = (
        "" if row.target is None else f"  {verdict([row])} ({row.target.share:.0%} of {row.target.limit})"
    )
    others = "".join(f"  {name} {ms:.2f} ms = {ms / row.ms:.2f}x" for name, ms in row.other_ms.items())
    return (
        f"{row.label:>17} {row.activations} {row.shape} {row.tokens:>5} tokens {row.ms:>9.2f} ms"
        f" {row.gigabytes_per_second:>6.1f} GB/s  read {row.share_of_read:>4.0%}"
        f"  peak {row.share_of_peak:>4.0%}  roof {row.share_of_roof:>4.0%}{target}{others}"
    )


def method_table(rows: Sequence[Row]) -> Table:
    """One line per method, one column per token count, and the verdict."""
    counts = sorted({row.tokens for row in rows})
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("method", "kernel", *(f"{n} token{'s' if n > 1 else ''}" for n in counts), "verdict"):
        table.add_column(column)
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.tokens: row for row in rows if row.method == method}
        cells = [_cell(own[count]) for count in counts]
        word = verdict(list(own.values()))
        colour = {GOOD: "green", BELOW: "yellow"}.get(word, "default")
        table.add_row(method, next(iter(own.values())).kernel, *cells, f"[{colour}]{word}[/]")
    return table


def _cell(row: Row) -> str:
    nearer = "read" if row.share_of_read > row.share_of_peak else "peak"
    limit = nearer if row.target is None or row.target.limit == "roof" else row.target.limit
    lines = [f"{row.ms:.2f} ms", f"{row.share(limit):.0%} of {limit}"]
    if row.misses_target:
        lines.append(f"[yellow]target {row.target.share:.0%}[/]")
    return "\n".join(lines)
