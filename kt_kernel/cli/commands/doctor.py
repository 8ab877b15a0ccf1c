"""`kt doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=examples("kt doctor", "kt doctor -v", "kt doctor --device"))(doctor)


def doctor(
    device: Annotated[
        bool, typer.Option("--device", help="Try every path between CPU and CUDA device instead.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Details, and why each kernel was chosen or not.")
    ] = False,
) -> None:
    """Check this installation, down to one real expert layer; exit status 1 if something is broken."""
    if device:
        from kt_kernel.cli.device_doctor import examine_device

        raise typer.Exit(examine_device())
    from kt_kernel.cli.doctor import Detail, examine

    raise typer.Exit(examine(Detail.FULL if verbose else Detail.BRIEF))
