"""Turns the JSON lines of bench/end_to_end.py into a Markdown table: a row per model and side.

python bench/end_to_end.py --make BF16 --make Q8_0 --make Q4_K_M --json > lines.jsonl
python bench/end_to_end_table.py lines.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = (
    "model",
    "side",
    "decode tokens/s",
    "share of read",
    "prompt of 128 / 1024",
    "4 / 8 streams",
    "first token",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line; what a side does not measure is a dash."""
    streams = " / ".join(f"{row[f'x{n}']:.1f}" for n in (4, 8)) if "x4" in row else "–"
    return (
        str(row["model"]),
        str(row["side"]),
        f"{row['decode']:.1f}",
        f"{row['share_of_read']:.0%} of {row['read_gb_s']:.0f} GB/s",
        " / ".join(f"{row[f'pp{n}']:.0f}" for n in (128, 1024)),
        streams,
        f"{row['ttft_in_steps']:.1f} steps",
    )


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown; tokens per second unless the head says otherwise."""
    lines = [HEAD, *map(cells, rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(HEAD), *text[1:]])


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else sys.stdin.read().splitlines()
    print(table(json.loads(line) for line in lines if line.startswith("{")))


if __name__ == "__main__":
    main()
