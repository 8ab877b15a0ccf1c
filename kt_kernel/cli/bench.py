"""`kt bench`: every method's speed on this machine as a share of what the machine can do."""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import native_extension, this_machine
from kt_kernel.cli.tables import WIDTH

if TYPE_CHECKING:
    from kt_kernel.bench.measure import Effort, Row


INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell gives it."""

USUAL_SECONDS = 120
"""For all methods, unless more are asked for. No method is begun that is expected to end later."""


@dataclass(frozen=True)
class Plan:
    """What to measure, checked: methods of this build, a name of SHAPES, token counts >= 1.

    `seconds`: no method is begun that would end later, as far as those before tell; None = no limit.
    """

    methods: tuple[str, ...]
    shape: str
    tokens: tuple[int, ...]
    threads: int
    seconds: int | None = None


def plan(
    methods: Sequence[str], shape: str, tokens: str, threads: int | None, seconds: int | None = None
) -> Plan:
    """The options, checked; no methods and no threads stand for all, no seconds for no limit if methods are
    named, else for USUAL_SECONDS.

    Raises:
        CommandError: a value that cannot be measured.
    """
    from kt_kernel.bench.shapes import SHAPES

    compiled = native_extension().METHODS
    for method in methods:
        if method not in compiled:
            raise CommandError(
                f"--method is {method!r}, but this build has {', '.join(compiled)}: use one of these"
            )
    if shape not in SHAPES:
        raise CommandError(f"--shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    counts = tokens.split(",")
    if not all(count.isascii() and count.isdigit() and int(count) for count in counts):
        raise CommandError(f"--tokens is {tokens!r}, expected numbers from 1 on with commas: 1,16,1024")
    return Plan(
        tuple(dict.fromkeys(methods)) or tuple(compiled),
        shape,
        tuple(sorted({int(count) for count in counts})),
        threads or this_machine().threads,
        seconds or (None if methods else USUAL_SECONDS),
    )


def print_json(chosen: Plan) -> int:
    """One JSON line per method and token count, as soon as it is measured; returns the exit status."""
    from kt_kernel.bench.report import json_line

    return _each_row(chosen, lambda row: typer.echo(json_line(row)))


def print_table(chosen: Plan) -> int:
    """The limits, and one line per measurement, as soon as it is made; returns the exit status."""
    from kt_kernel.bench.limits import describe_limits
    from kt_kernel.bench.report import head_line, table_line

    heads: list[str] = []

    def show(row: Row) -> None:
        if not heads:
            heads.extend(textwrap.wrap(describe_limits(chosen.threads, row.limits), WIDTH))
            heads.append(
                f"shape {chosen.shape}; weights from memory; medians; bytes as a checkpoint has them"
            )
            typer.echo("\n".join([*heads, "", head_line()]))
        typer.echo(table_line(row))

    return _each_row(chosen, show)


def _each_row(chosen: Plan, show: Callable[[Row], None]) -> int:
    """Ctrl-C ends it, and so does the time; what was measured has been shown."""
    from kt_kernel.bench.measure import measure_method
    from kt_kernel.bench.shapes import SHAPES
    from kt_kernel.cli.busy_cores import warning

    logging.getLogger("kt_kernel.formats.methods").setLevel(logging.WARNING)  # the kernels are in the table
    if sentence := warning():
        typer.echo(f"kt: {sentence}", err=True)
    clock = _Clock(chosen)
    typer.echo(f"kt: {clock.announcement}", err=True)
    for number, method in enumerate(chosen.methods):
        effort = clock.effort(number)
        if effort is None:
            typer.echo(f"kt: {clock.rest(number)}", err=True)
            break
        _show_progress(f"measuring {method} ({number + 1} of {len(chosen.methods)})")
        try:
            rows = measure_method(method, SHAPES[chosen.shape], chosen.tokens, chosen.threads, effort)
        except KeyboardInterrupt:
            _show_progress("")
            typer.echo(f"kt: stopped after {number} of {len(chosen.methods)} methods", err=True)
            return INTERRUPTED
        _show_progress("")
        for row in rows:
            show(row)
    return 0


class _Clock:
    """What is still to be measured in the time that was given, and how often."""

    def __init__(self, chosen: Plan) -> None:
        self._chosen = chosen
        self._begin = time.monotonic()

    @property
    def announcement(self) -> str:
        """How long it will take, as far as that is known beforehand."""
        count = len(self._chosen.methods)
        what = "1 method" if count == 1 else f"{count} methods"
        if self._chosen.seconds is None:
            return f"measuring {what}, some seconds each"
        return f"measuring {what}; none is begun that would end after {self._chosen.seconds} s (--seconds)"

    def effort(self, done: int) -> Effort | None:
        """For the next method after so many: less where time gets short, None where there is none left."""
        from kt_kernel.bench.measure import ONE_ROUND, QUICK

        if self._chosen.seconds is None or done == 0:
            return QUICK
        spent = time.monotonic() - self._begin
        left = self._chosen.seconds - spent
        each = spent / done
        if left >= each * (len(self._chosen.methods) - done):
            return QUICK
        return ONE_ROUND if left >= each else None

    def rest(self, done: int) -> str:
        """What was not measured, and how to."""
        names = self._chosen.methods[done:]
        return (
            f"{self._chosen.seconds} s are over before {', '.join(names)}; measure them with "
            f"{' '.join(f'--method {name}' for name in names)}, or all with a larger --seconds"
        )


def _show_progress(text: str) -> None:
    """On a line that is written over; only for a person."""
    if sys.stderr.isatty():
        typer.echo(f"\r\033[K{text}", nl=False, err=True)
