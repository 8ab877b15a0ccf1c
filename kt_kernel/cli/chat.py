"""`kt chat`: reads, asks or obeys, until /quit or the end of input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from kt_kernel.cli.conversation import commands
from kt_kernel.cli.conversation.messages import Conversation
from kt_kernel.cli.conversation.reading import joined, reader
from kt_kernel.cli.conversation.screen import screen
from kt_kernel.cli.conversation.settings import ChatSettings
from kt_kernel.cli.errors import CommandError

if TYPE_CHECKING:
    from openai import OpenAI


def converse(settings: ChatSettings) -> int:
    """Read questions until /quit or the end of input; a question that fails does not end the conversation.

    Returns the exit status: 1 if the questions come from a file or a pipe and one of them failed.

    Raises:
        CommandError: no server answers there, or it wants another key.
    """
    from openai import OpenAI

    # A local server needs no key, but the client insists on one. A person asks again without being told to.
    client = OpenAI(base_url=settings.base_url, api_key=settings.api_key or "none", max_retries=0)
    model = settings.model or _served_model(client, settings)
    greeting = f"{model} at {settings.base_url}; /help lists commands, /quit ends."
    typer.echo(greeting, err=not sys.stdout.isatty())  # a file holds the answers only
    conversation = Conversation(client, settings, model)
    read = reader()
    failed = 0
    while True:
        try:
            text = joined(read())
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=not sys.stdout.isatty())
            break
        try:
            _answer(text, conversation)
        except commands.Quit:
            break
        except CommandError as error:
            failed += 1
            typer.echo(f"kt: {error}", err=True)
    return int(failed > 0 and not sys.stdin.isatty())


def _served_model(client: OpenAI, settings: ChatSettings) -> str:
    import openai

    try:
        return client.models.list().data[0].id
    except openai.AuthenticationError as error:
        raise CommandError(
            f"The server at {settings.base_url} refuses the key: give its own with --api-key or KT_API_KEY"
        ) from error
    except (openai.OpenAIError, IndexError) as error:
        raise CommandError(
            f"No server answers at {settings.base_url} ({error}): start one with kt run, or name it with "
            "--host and --port."
        ) from error


def _answer(text: str, conversation: Conversation) -> None:
    question: str | None = text
    if text.startswith("//"):
        question = text[1:]
    elif text.startswith("/"):
        question = commands.run(text, conversation, typer.echo)
    if question:
        shown = screen()
        try:
            answer = conversation.ask(question, shown)
        except CommandError:
            shown.break_off()
            raise
        shown.end(answer.times())
