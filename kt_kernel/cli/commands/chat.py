"""`kt chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import ApiKey, Host, Port, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "kt chat",
            "kt chat -p 31000 -s 'Answer in one sentence.' -t 0",
            "echo 'What is the capital of France?' | kt chat > answer.txt",
        )
    )(chat)


def chat(
    host: Host = "127.0.0.1",
    port: Port = 30000,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model name; default: the one being served.")
    ] = "",
    system: Annotated[str, typer.Option("--system", "-s", help="System message.")] = "",
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, help="Default: the model's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length limit of an answer.")] = 2048,
    api_key: ApiKey = "",
) -> None:
    """Talk to a running server; /help lists what else one can say."""
    from kt_kernel.cli.chat import converse
    from kt_kernel.cli.conversation.settings import ChatSettings

    settings = ChatSettings(host, port, model, system, temperature, max_tokens, api_key)
    raise typer.Exit(converse(settings))
