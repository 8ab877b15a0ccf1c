"""What all commands share: errors as sentences, complete help texts, the options that name a server."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kt_kernel.errors import KTError

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

Host = Annotated[str, typer.Option("--host", "-H", help="Where the server listens.")]
Port = Annotated[int, typer.Option("--port", "-p", help="The server's port.")]
ApiKey = Annotated[
    str, typer.Option("--api-key", envvar="KT_API_KEY", help="Where the server was started with one.")
]


class CommandGroup(TyperGroup):
    """A group that shows a `KTError` as one sentence (exit status 1) and lists its commands uncut."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KTError as error:
            typer.echo(f"kt: {error}", err=True)
            raise typer.Exit(1) from error

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Every command with the whole first paragraph of its help, wrapped instead of cut."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_paragraph(found.help)) for name, found in commands if not found.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def group(name: str | None = None, **settings: Any) -> typer.Typer:
    """A typer application with the habits of `kt`: plain text, -h, tracebacks only for our own mistakes."""
    return typer.Typer(
        name=name,
        cls=CommandGroup,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=HELP_NAMES,
        **settings,
    )


def examples(*lines: str, also: str = "") -> str:
    """The end of a help text: commands one can paste, on lines of their own, and a closing paragraph."""
    text = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
    return f"{text}\n\n{also}" if also else text
