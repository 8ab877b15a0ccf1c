"""JSON lines of bench/moe.py (standard input) -> a table for doc/measurements.md: a line per kernel.

A cell is the time and its share of the limit that the row's target names, else of the nearer one; "!" marks a
missed target, "slow" int8 activations that took longer than bf16 ones in the same run.

    python bench/moe.py --activations bf16 --activations int8 --tokens 1,16,1024 --json |
        python bench/speed_table.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable


def cell(row: dict) -> str:
    """Time, share and marks of one row."""
    nearer = "read" if row["share_of_read"] > row["share_of_peak"] else "peak"
    limit = row["target"]["limit"] if row["target"] else nearer
    if limit == "roof":
        limit = nearer
    marks = "!" if row["verdict"] == "below target" else ""
    if row["activations"] == "int8" and row["ms"] > row["other_ms"].get("bf16", float("inf")):
        marks += " slow"
    return f"{row['ms']:.3g} ms, {row[f'share_of_{limit}']:.0%} of {limit}{marks}"


def label(row: dict) -> str:
    """Method and, where it has several, format."""
    return row["method"] if row["format"] == row["method"] else f"{row['method']} {row['format']}"


def table(rows: Iterable[dict]) -> str:
    """Markdown: kernels down, shapes and token counts across."""
    lines: dict[tuple[str, str, str], dict[tuple[str, int], str]] = {}
    for row in rows:
        kernel = (label(row), row["activations"], row["kernel"])
        lines.setdefault(kernel, {})[row["shape"], row["tokens"]] = cell(row)
    columns = sorted({key for cells in lines.values() for key in cells}, key=lambda key: (key[0] != "S", key))
    heads = ["method", "activations", "kernel", *(f"{shape}, {tokens}" for shape, tokens in columns)]
    body = [
        [f"`{m}`", a, f"`{k}`", *(cells.get(c, "") for c in columns)] for (m, a, k), cells in lines.items()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *body])


def limits(rows: Iterable[dict]) -> str:
    """The range of each limit over all rows, in G/s."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        for name, limit in row["limits"].items():
            seen.setdefault(f"{name} ({limit['how']})", []).append(limit["per_second"] / 1e9)
    return ", ".join(f"{name} {min(each):.0f}-{max(each):.0f} G/s" for name, each in seen.items())


def main() -> None:
    rows = [json.loads(line) for line in sys.stdin if line.startswith("{")]
    print(f"{rows[0]['variant']}, {rows[0]['threads']} threads: {limits(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
