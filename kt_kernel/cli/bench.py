"""`kt bench`: every method's speed on this machine as a share of what the machine can do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import native_extension, this_machine

if TYPE_CHECKING:
    from kt_kernel.bench.measure import Row


@dataclass(frozen=True)
class Plan:
    """What to measure, checked: methods of this build, a name of SHAPES, token counts >= 1."""

    methods: tuple[str, ...]
    shape: str
    tokens: tuple[int, ...]
    threads: int


def plan(methods: Sequence[str], shape: str, tokens: str, threads: int | None) -> Plan:
    """The options, checked; no methods and no threads stand for all.

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
    )


def print_json(chosen: Plan) -> None:
    """One JSON line per method and token count, as soon as it is measured."""
    from kt_kernel.bench.report import json_line

    for row in _rows(chosen):
        typer.echo(json_line(row))


def print_table(chosen: Plan) -> None:
    """The limits, and one line per method with its verdict."""
    from kt_kernel.bench.limits import describe_limits
    from kt_kernel.bench.report import method_table

    rows = []
    with Console(stderr=True).status("measuring") as status:
        for row in _rows(chosen):
            rows.append(row)
            status.update(f"measured {row.method} with {row.tokens} token(s)")
    console = Console()
    console.out(describe_limits(chosen.threads, rows[0].limits), highlight=False)
    console.out(f"shape {chosen.shape}, weights from memory, medians, bytes as a checkpoint stores them")
    console.print(method_table(rows))


def _rows(chosen: Plan) -> Iterator[Row]:
    from kt_kernel.bench.measure import QUICK, measure_method
    from kt_kernel.bench.shapes import SHAPES

    logging.getLogger("kt_kernel.formats.methods").setLevel(logging.WARNING)  # the kernels are in the table
    for method in chosen.methods:
        yield from measure_method(method, SHAPES[chosen.shape], chosen.tokens, chosen.threads, QUICK)
