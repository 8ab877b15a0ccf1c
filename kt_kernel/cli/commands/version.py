"""`kt version`, and the same text for `kt --version`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(version)


def version() -> None:
    """Print the versions that matter in a bug report."""
    from kt_kernel.cli.version import version_lines

    typer.echo("\n".join(version_lines()))


def show_version_and_stop(wanted: bool) -> None:
    """Callback of `kt --version`: the program's own version, on one line."""
    if wanted:
        from kt_kernel.cli.version import installed_version

        typer.echo(f"kt-kernel {installed_version('kt-kernel')}")
        raise typer.Exit
