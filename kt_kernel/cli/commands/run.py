"""`kt run`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        context_settings={"ignore_unknown_options": True},
        epilog=examples(
            "kt run demo --port 31000",
            "kt run /models/Qwen3-30B-A3B --dry-run",
            "kt run model-Q4_K_M.gguf --context-length 8192",
            also="All other options go to the server: see python -m sglang.launch_server --help.",
        ),
    )(run)


def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [SERVER OPTIONS]",
            help="'demo', a checkpoint directory or a .gguf file, then options.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the server command and stop.")] = False,
) -> None:
    """Start an OpenAI-compatible server: kt run demo --port 31000."""
    from kt_kernel.cli.run import dry_run_text, serve

    model, *server_options = arguments
    if model.startswith("-"):
        raise typer.BadParameter(f"the model comes first: kt run demo {model} ...", param_hint="MODEL")
    if dry_run:
        typer.echo(dry_run_text(model, server_options))
    else:
        raise typer.Exit(serve(model, server_options))
