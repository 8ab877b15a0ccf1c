"""Turns the JSON lines of bench/end_to_end.py into the Markdown table of doc/operators.md, a column per side.

python bench/end_to_end.py --make BF16 --make Q8_0 --make Q4_K_M --json | python bench/end_to_end_table.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

FIGURES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("decode (share)", lambda row: f"{row['decode']:.1f} ({row['share_of_read']:.0%})".replace("%", " %")),
    ("prompt of 128 / 1024", lambda row: f"{row['pp128']:.0f} / {row['pp1024']:.0f}"),
    ("4 / 8 streams", lambda row: f"{row['x4']:.0f} / {row['x8']:.0f}" if "x4" in row else "–"),
    ("first token, in steps", lambda row: f"{row['ttft_in_steps']:.1f}"),
)


def table(rows: Iterable[Row]) -> str:
    """Markdown; a side that did not run a model has dashes."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["side"]] = row
    sides = list(dict.fromkeys(side for of_model in models.values() for side in of_model))
    lines = [("file", "tokens/s", *sides), ("---",) * (2 + len(sides))]
    for model, of_model in models.items():
        for number, (name, text) in enumerate(FIGURES):
            cells = (text(of_model[side]) if side in of_model else "–" for side in sides)
            lines.append(("" if number else model, name, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(line) for line in sys.stdin if line.startswith("{")))
