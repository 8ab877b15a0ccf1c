"""The typer application behind the `kt` command: the table of its commands.

Only typer is imported here: `kt --help` must not pay for torch.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from kt_kernel.cli.commands import (
    bench,
    chat,
    completion,
    config,
    doctor,
    model,
    quant,
    run,
    sft,
    top,
    version,
)
from kt_kernel.cli.commands.base import group
from kt_kernel.cli.settings import command_defaults, config_file

COMMANDS = (run, model, chat, top, doctor, bench, quant, sft, config, completion, version)
"""In the order of `kt --help`."""

# Their options have defaults in the user's file; the others work whatever state it is in.
_WITH_SETTINGS = ("chat", "top", "bench")

app = group("kt", no_args_is_help=True)


@app.callback()
def kt(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=version.show_version_and_stop,
            help="Print the version and exit; kt version prints more.",
        ),
    ] = False,
) -> None:
    """Serve mixture-of-experts models whose experts run on the CPU."""
    # Our own progress only: HTTP clients and torch log too much at this level.
    logging.basicConfig(level=logging.WARNING, format="kt: %(message)s", stream=sys.stderr)
    logging.getLogger("kt_kernel").setLevel(logging.INFO)
    if context.invoked_subcommand in _WITH_SETTINGS and config_file().exists():
        context.default_map = command_defaults()


for command in COMMANDS:
    command.register(app)
