"""`kt quant`: a model's experts as integers for the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import native_extension
from kt_kernel.cli.model import DEMO, demo_model


@dataclass(frozen=True)
class QuantSettings:
    """The options as typed; None = left out."""

    model: str
    method: str
    group_size: int | None
    output: str | None
    input_type: str | None
    threads: int | None


def quantise(settings: QuantSettings) -> None:
    """Convert and say where the result is.

    Raises:
        KTError: the model cannot be converted, or the output folder holds something else.
    """
    native_extension()
    from kt_kernel.convert.job import Conversion
    from kt_kernel.convert.settings import default_threads, run
    from kt_kernel.convert.targets import target

    source = demo_model().path if settings.model == DEMO else Path(settings.model).expanduser()
    if not source.exists():
        raise CommandError(
            f"There is no directory {settings.model!r}: give '{DEMO}' or the directory of a downloaded "
            "checkpoint."
        )
    chosen = target(settings.method, settings.group_size)
    output = Path(settings.output).expanduser() if settings.output else default_output(source, chosen.method)
    threads = settings.threads or default_threads()
    typer.echo(run(Conversion(source, output, chosen, threads, settings.input_type)))


def default_output(source: Path, method: str) -> Path:
    """Beside the model: /models/Qwen3-30B-A3B -> /models/Qwen3-30B-A3B-AMXINT4."""
    source = source.resolve()
    return source.with_name(f"{source.name}-{method}")
