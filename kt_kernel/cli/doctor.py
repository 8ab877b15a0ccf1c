"""`kt doctor`: prints every check's finding and the kernels, in lines of at most 80 columns."""

from __future__ import annotations

import enum
import logging
import textwrap

from rich.console import Console

from kt_kernel.cli.checks import CHECKS, Finding, Status, run_check
from kt_kernel.cli.kernel_lines import COLUMNS, detail_lines, summary_lines
from kt_kernel.cli.machine import native_extension

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}
_NAME_COLUMNS = 14
_INDENT = " " * 19  # what stands before a finding


class Detail(enum.Enum):
    """BRIEF: one line per check and method. FULL: also what else was seen, and why kernels were chosen."""

    BRIEF = "brief"
    FULL = "full"


def examine(detail: Detail = Detail.BRIEF) -> int:
    """Run all checks; returns the exit status: 1 if any failed."""
    # The kernels are in the table below.
    logging.getLogger("kt_kernel.formats.methods").setLevel(logging.WARNING)
    console = Console()
    worst_is_failure = False
    for name, check in CHECKS.items():
        finding = run_check(check)
        worst_is_failure |= finding.status is Status.FAIL
        console.print(f"[{_COLOURS[finding.status]}]{finding.status.value:5}[/]", end="")
        for line in _finding_lines(name, finding, detail):
            console.out(line, highlight=False)
    _print_kernels(console, detail)
    console.out(
        "Something is broken: see the lines marked fail." if worst_is_failure else "All checks passed."
    )
    return int(worst_is_failure)


def _finding_lines(name: str, finding: Finding, detail: Detail) -> list[str]:
    """The first is shorter by the status in front of it."""
    lines = _wrapped(finding.seen)
    if detail is Detail.FULL and finding.detail:
        lines += _wrapped(finding.detail)
    if finding.advice:
        lines += _wrapped(f"-> {finding.advice}")
    return [f"{name:{_NAME_COLUMNS}}{lines[0]}", *(_INDENT + line for line in lines[1:])]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS - len(_INDENT), break_on_hyphens=False) or [""]


def _print_kernels(console: Console, detail: Detail) -> None:
    try:
        rows = native_extension().dispatch_table()
    except ValueError:
        return  # the check "extension" or "cpu" has said why
    for line in ["", *summary_lines(rows), ""]:
        console.out(line, highlight=False)
    if detail is Detail.BRIEF:
        console.out("kt doctor -v says why, and shows every other kernel.", highlight=False)
        return
    for line in detail_lines(rows):
        console.out(line, highlight=False)
