"""`kt config`: get, set, unset, list and path."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples, group

config = group()

Name = Annotated[str, typer.Argument(metavar="KEY", help="One of kt config list.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.add_typer(config, name="config", no_args_is_help=True)


@config.callback()
def _config() -> None:
    """Keep your own defaults of host, port, threads, model folders and more."""


@config.command("list", epilog=examples("kt config list"))
def list_settings() -> None:
    """Every setting, what it is for, and its value where you have set one."""
    from kt_kernel.cli.settings import KEYS, load
    from kt_kernel.cli.tables import wrapped_rows

    values = load()
    rows = [(key, _shown(values.get(key)), known.what) for key, known in KEYS.items()]
    typer.echo("\n".join(wrapped_rows(("setting", "value", "what for"), rows)))


@config.command("get", epilog=examples("kt config get port"))
def get(key: Name) -> None:
    """Print one value; exit status 1 where you have set none."""
    from kt_kernel.cli.settings import configured

    value = configured(key)
    if value is None:
        typer.echo(f"kt: {key} is not set: kt config set {key} VALUE", err=True)
        raise typer.Exit(1)
    typer.echo(_shown(value))


@config.command(
    "set",
    context_settings={"ignore_unknown_options": True},  # a value may look like an option: run.options
    epilog=examples(
        "kt config set port 31000",
        "kt config set model-folders /models:/mnt/big",
        "kt config set run.options '--context-length 8192'",
    ),
)
def set_value(key: Name, value: Annotated[str, typer.Argument(help="Checked before it is kept.")]) -> None:
    """Keep a value; an option on a command line still wins over it."""
    from kt_kernel.cli import settings

    settings.set_value(key, value)


@config.command("unset", epilog=examples("kt config unset port"))
def unset(key: Name) -> None:
    """Forget a value, so that the program's own default counts again."""
    from kt_kernel.cli import settings

    settings.unset(key)


@config.command("path", epilog=examples("kt config path", "$EDITOR $(kt config path)"))
def path() -> None:
    """Print the name of the file, whether it exists or not."""
    from kt_kernel.cli.settings import config_file

    typer.echo(config_file())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return ":".join(map(str, value)) if isinstance(value, list) else str(value)
