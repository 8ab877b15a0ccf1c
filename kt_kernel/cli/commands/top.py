"""`kt top`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import ApiKey, Host, Port, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=examples("kt top", "kt top -p 31000 -i 5", "kt top --readings 1 > report.txt"))(top)


def top(
    host: Host = "127.0.0.1",
    port: Port = 30000,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two readings.")
    ] = 1.0,
    readings: Annotated[
        int | None, typer.Option("--readings", "-n", min=1, help="Stop after so many; default: at q.")
    ] = None,
    api_key: ApiKey = "",
) -> None:
    """Watch where a running server's experts live: hit rates, moved experts, bytes, CPU speed."""
    from kt_kernel.cli.top import TopSettings, watch

    watch(TopSettings(host, port, interval, readings, api_key))
