"""`kt doctor`: prints every check's finding and the dispatch table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kt_kernel.cli.checks import CHECKS, Status, run_check
from kt_kernel.cli.machine import native_extension

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


def examine() -> int:
    """Run all checks; returns the exit status: 1 if any failed."""
    console = Console()
    worst_is_failure = False
    for name, check in CHECKS.items():
        finding = run_check(check)
        worst_is_failure |= finding.status is Status.FAIL
        console.print(f"[{_COLOURS[finding.status]}]{finding.status.value:5}[/]", end="")
        console.out(f"{name:13} {finding.seen}", highlight=False)
        if finding.advice:
            console.out(f"{'':18} -> {finding.advice}", highlight=False)
    _print_dispatch(console)
    console.out(
        "Something is broken: see the lines marked fail." if worst_is_failure else "All checks passed."
    )
    return int(worst_is_failure)


def _print_dispatch(console: Console) -> None:
    try:
        rows = native_extension().dispatch_table()
    except ValueError:
        return  # the check "extension" or "cpu" has said why
    table = Table(title="Kernels", title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("method", "operation", "kernel", "needs", "state", "reason")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(" ".join(row[c]) if c == "needs" else row[c] for c in columns))
    console.print(table)
