"""Writes the support matrix of doc/kernels.md from the extension's dispatch table.

    python scripts/support_matrix.py            rewrite the matrix in doc/kernels.md
    python scripts/support_matrix.py --check    change nothing; exit status 1 if the page is out of date

The matrix holds what is true of the build (which kernel needs which CPU features), not what this machine
chooses: `kt doctor` prints that.
"""

from __future__ import annotations

import sys
from itertools import starmap
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "doc" / "kernels.md"
BEGIN = "<!-- support matrix: written by scripts/support_matrix.py -->"
END = "<!-- end of support matrix -->"


def matrix(rows: list[dict]) -> str:
    """The dispatch table's rows as a Markdown table, in the table's order (first match wins).

    Methods that share a kernel share a line; a method with several formats is followed by those meant.
    """
    methods: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        line = (row["operation"], row["activations"], row["kernel"], " ".join(row["needs"]))
        methods.setdefault(line, {}).setdefault(row["method"], []).append(row["format"])
    lines = [
        "| methods | operation | activations | kernel | CPU features it needs |",
        "|---|---|---|---|---|",
    ]
    for (operation, activations, kernel, needs), of_line in methods.items():
        names = ", ".join(starmap(described, of_line.items()))
        lines.append(f"| {names} | {operation} | {activations} | `{kernel}` | {needs} |")
    return "\n".join(lines)


def described(method: str, formats: list[str]) -> str:
    """The method, and which of its formats, where it has several."""
    return method if formats == [method] else f"{method} ({', '.join(formats)})"


def with_matrix(page: str, table: str) -> str:
    """`page` with the text between the markers replaced; raises ValueError if they are missing."""
    before, found_begin, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(
            f"doc/kernels.md lacks the lines {BEGIN!r} and {END!r} around the matrix: put them back"
        )
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> int:
    """Exit status: 1 if --check found an outdated page."""
    from kt_kernel import kt_kernel_ext

    page = PAGE.read_text(encoding="utf-8")
    current = with_matrix(page, matrix(kt_kernel_ext.dispatch_table()))
    if "--check" in sys.argv[1:]:
        if page != current:
            print("The support matrix of doc/kernels.md is out of date: run python scripts/support_matrix.py")
            return 1
        return 0
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
