"""`kt completion`: the script that completes `kt` in a shell, for those who place it themselves."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples

_ENDING = {
    "bash": "kt completion bash > ~/.local/share/bash-completion/completions/kt",
    "zsh": "kt completion zsh > ~/.zfunc/_kt  # with ~/.zfunc in fpath",
    "fish": "kt completion fish > ~/.config/fish/completions/kt.fish",
}


class Shell(enum.StrEnum):
    """Those that typer can complete in."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(*_ENDING.values(), also="kt --install-completion does it for the current shell.")
    )(completion)


def completion(shell: Annotated[Shell, typer.Argument(help="Which shell.")], context: typer.Context) -> None:
    """Print the script that completes kt's commands and options in bash, zsh or fish."""
    from typer.completion import shell_complete

    shell_complete(context.find_root().command, {}, "kt", "_KT_COMPLETE", f"source_{shell.value}")
