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
            "kt run Qwen/Qwen3-30B-A3B --dry-run",
            "kt run /models/Qwen3-30B-A3B --kt-num-gpu-experts 16",
            "kt run model-Q4_K_M.gguf --context-length 8192",
            also="All other options go to the server: see python -m sglang.launch_server --help.",
        ),
    )(run)


def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [SERVER OPTIONS]",
            help="'demo', a directory, a .gguf file, a hub id or a name of kt model list; then options.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the server command, and stop.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan and the command as JSON.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start also what does not fit, by the plan.")
    ] = False,
    api_key_file: Annotated[
        str,
        typer.Option("--api-key-file", metavar="FILE", help="The key that clients must give; or KT_API_KEY."),
    ] = "",
) -> None:
    """Start an OpenAI-compatible server: kt run demo --port 31000.

    It first prints what will lie where, which flags were chosen, and what speed to expect.
    """
    from kt_kernel.cli import run as running
    from kt_kernel.planning.plan import Fit

    model, *server_options = arguments
    if model.startswith("-"):
        raise typer.BadParameter(f"the model comes first: kt run demo {model} ...", param_hint="MODEL")
    if json and not dry_run:
        raise typer.BadParameter("it goes with --dry-run", param_hint="--json")
    if api_key_file:
        server_options += ["--api-key-file", api_key_file]
    fit = Fit.PLAN_ALL_THE_SAME if force else Fit.REFUSE
    if not dry_run:
        raise typer.Exit(running.serve(model, server_options, fit))
    result = running.dry_run(model, server_options, fit)
    if json:
        typer.echo(result.json)
    else:
        typer.echo(result.plan, err=True)
        typer.echo(result.command)
