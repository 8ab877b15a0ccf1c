"""`kt model verify`: the findings as lines."""

from __future__ import annotations

import enum
import sys
from pathlib import Path

import typer

from kt_kernel.cli.models.known import model_named
from kt_kernel.cli.models.records import ModelRecord, keep_record, record_of
from kt_kernel.cli.models.verify import check_bytes, check_structure


class Depth(enum.Enum):
    """HEADERS: names and headers. ALL: every byte."""

    HEADERS = "headers"
    ALL = "all"


def verify(name: str, depth: Depth) -> int:
    """Print what is wrong; returns the exit status.

    Raises:
        KTError: there is no such model, or the records cannot be read.
    """
    model = model_named(name)
    problems = check_structure(model)
    summary = "names and headers are sound"
    if depth is Depth.ALL:
        result = check_bytes(model, record_of(model) or ModelRecord(), show_reading)
        clear_reading()
        problems += result.problems
        summary += f"; {result.compared} files are as recorded, {result.recorded} recorded now"
        if not problems:
            keep_record(model, result.record)
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{model}: {len(problems)} problems" if problems else f"{model}: {summary}")
    return int(bool(problems))


def show_reading(path: Path) -> None:
    """In a terminal: the name of a file that takes a while to read, in place of the last one."""
    if sys.stderr.isatty():
        typer.echo(f"\r\033[Kreading {path.name}", nl=False, err=True)


def clear_reading() -> None:
    """Take the name away again."""
    if sys.stderr.isatty():
        typer.echo("\r\033[K", nl=False, err=True)
