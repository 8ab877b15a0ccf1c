"""A benchmark's rows for machines (JSON lines) and for people (lines as they come)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

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


_HEAD = ("method", "kernel", "tokens", "ms", "GB/s", "read", "peak", "target")


def head_line() -> str:
    """Over `table_line`s; 80 columns at most."""
    return _table_line(_HEAD)


def table_line(row: Row) -> str:
    """One measurement: shares of the measured read bandwidth and of the arithmetic's peak, and the verdict:
    "good", or the share it should have ("75% read"), or "-" without a target.
    """
    word = verdict([row])
    if row.misses_target and row.target is not None:
        word = f"{row.target.share:.0%} {row.target.limit}"
    figures = (f"{row.ms:.2f}", f"{row.gigabytes_per_second:.1f}")
    shares = (f"{row.share_of_read:.0%}", f"{row.share_of_peak:.0%}")
    return _table_line((row.method, row.kernel, str(row.tokens), *figures, *shares, word))


def _table_line(cells: Sequence[str]) -> str:
    method, kernel, tokens, ms, speed, read, peak, target = cells
    return f"{method:15}{kernel:23}{tokens:>6}{ms:>9}{speed:>6}{read:>5}{peak:>5}  {target}".rstrip()
