"""Writes the table of device formats in doc/serving.md from the rows that tests/sglang_cuda checks.

python scripts/device_formats.py            rewrite the table
python scripts/device_formats.py --check    change nothing; exit status 1 if the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "doc" / "serving.md"
BEGIN = "<!-- device formats: written by scripts/device_formats.py -->"
END = "<!-- end of device formats -->"

_MARKS = {"works": "yes", "refused": "refused", "not SGLang": "-"}


def table() -> str:
    """One line per format and backend, one column per compute capability, and why it is refused on some."""
    sys.path.append(str(ROOT / "tests" / "sglang_cuda"))
    from rows import EVERY_GPU, ROWS

    lines = [
        "| experts on the GPU | `--moe-runner-backend` | "
        + " | ".join(f"SM {gpu}" for gpu in EVERY_GPU)
        + " | refused because |",
        "|---" * (3 + len(EVERY_GPU)) + "|",
    ]
    for row in ROWS:
        marks = " | ".join(_MARKS[row.expected(gpu)] for gpu in EVERY_GPU)
        lines.append(f"| {row.title} | `{row.backend}` | {marks} | {row.why} |")
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """`page` with the text between the markers replaced; raises ValueError if they are missing."""
    before, found_begin, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"doc/serving.md lacks the lines {BEGIN!r} and {END!r}: put them back")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    """Exit status: 1 if --check found an outdated page."""
    page = PAGE.read_text(encoding="utf-8")
    current = with_table(page, table())
    if "--check" in sys.argv[1:]:
        if page != current:
            print("doc/serving.md's device formats are out of date: run python scripts/device_formats.py")
            return 1
        return 0
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
