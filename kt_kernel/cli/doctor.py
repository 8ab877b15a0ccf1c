"""`kt doctor`: a line of at most 80 columns per check, what to do about those not well, and a verdict."""

from __future__ import annotations

import enum
import logging
import textwrap
from collections.abc import Iterator

from rich.console import Console

from kt_kernel.cli.checks import CHECKS, Check, run_checks
from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.kernel_lines import COLUMNS, detail_lines, summary_lines
from kt_kernel.cli.machine import native_extension

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red", Status.SKIP: "dim"}
_NAME_COLUMNS = 14
_INDENT = " " * 19  # what stands before a finding


class Detail(enum.Enum):
    """BRIEF: a line per check that is well. FULL: whole findings, what else was seen, and all kernels."""

    BRIEF = "brief"
    FULL = "full"


def examine(detail: Detail = Detail.BRIEF, checks: tuple[Check, ...] = CHECKS) -> int:
    """Run all checks; returns the exit status: 1 if any failed."""
    # The kernels have a check, and a table with -v.
    logging.getLogger("kt_kernel.formats.methods").setLevel(logging.WARNING)
    console = Console()
    findings: dict[str, Finding] = {}
    for name, finding in run_checks(checks):
        findings[name] = finding
        console.print(f"[{_COLOURS[finding.status]}]{finding.status.value:5}[/]", end="")
        for line in _finding_lines(name, finding, detail):
            console.out(line, highlight=False)
    if detail is Detail.FULL:
        for line in _kernel_lines():
            console.out(line, highlight=False)
    for line in _verdict(findings):
        console.out(line, highlight=False)
    return int(any(finding.status is Status.FAIL for finding in findings.values()))


def _finding_lines(name: str, finding: Finding, detail: Detail) -> list[str]:
    """The first is shorter by the status in front of it."""
    if detail is Detail.BRIEF and finding.status in (Status.OK, Status.SKIP):
        return [f"{name:{_NAME_COLUMNS}}{_cut(finding.seen)}"]
    lines = _wrapped(finding.seen)
    if detail is Detail.FULL and finding.detail:
        lines += _wrapped(finding.detail)
    if finding.advice:
        lines += _wrapped(f"-> {finding.advice}")
    return [f"{name:{_NAME_COLUMNS}}{lines[0]}", *(_INDENT + line for line in lines[1:])]


def _cut(text: str) -> str:
    """One line; of a long one the middle is left out, because paths tell most at their ends."""
    room = COLUMNS - len(_INDENT)
    if len(text) <= room:
        return text
    tail = room // 2
    return f"{text[: room - tail - 3]}...{text[-tail:]}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS - len(_INDENT), break_on_hyphens=False) or [""]


def _kernel_lines() -> Iterator[str]:
    try:
        rows = native_extension().dispatch_table()
    except ValueError:
        return  # the check "extension" or "cpu" has said why
    yield from ["", *summary_lines(rows), ""]
    yield from detail_lines(rows)
    yield ""


def _verdict(findings: dict[str, Finding]) -> Iterator[str]:
    """What holds, and the first thing to do."""

    def names(status: Status) -> list[str]:
        return [name for name, finding in findings.items() if finding.status is status]

    failed, warned, skipped = names(Status.FAIL), names(Status.WARN), names(Status.SKIP)
    if failed:
        untried = f" ({len(skipped)} not tried)" if skipped else ""
        yield from _sentence(f"{len(failed)} of {len(findings)} checks failed{untried}: {', '.join(failed)}.")
        if advice := findings[failed[0]].advice:
            yield from _sentence(f"First {advice}.")
    elif warned:
        yield from _sentence(f"No check failed; worth a look: {', '.join(warned)}.")
    else:
        yield f"All {len(findings)} checks passed."


def _sentence(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, break_on_hyphens=False)
