"""What a line that begins with a slash does."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from kt_kernel.cli.conversation.messages import Conversation
from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.tables import wrapped_rows

Say = Callable[[str], None]
Command = Callable[[Conversation, str, Say], str | None]
"""Of the conversation, what stands after the name, and where to print. Returns a question to ask, if any."""


class Quit(Exception):
    """Raised by /quit."""


def run(line: str, conversation: Conversation, say: Say) -> str | None:
    """Do what `line` ("/save notes.md") says; returns a question that is to be asked now, if any.

    Raises:
        Quit: it was /quit.
        CommandError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise CommandError(f"There is no command {name}: /help lists them. //text asks /text.")
    return COMMANDS[name][0](conversation, rest.strip(), say)


def _help(conversation: Conversation, rest: str, say: Say) -> None:
    rows = [(name, what) for name, (_, what) in COMMANDS.items()]
    rows += [
        ("Alt-Enter", 'begins a new line; so does Enter after \\ or between two """'),
        ("Ctrl-C", "stops an answer and keeps what came"),
        ("Ctrl-D", "ends the conversation"),
    ]
    say("\n".join(wrapped_rows(("command", "what it does"), rows)))


def _clear(conversation: Conversation, rest: str, say: Say) -> None:
    conversation.clear()
    say("Forgotten.")


def _history(conversation: Conversation, rest: str, say: Say) -> None:
    say(conversation.text() or "Nothing has been said.")


def _info(conversation: Conversation, rest: str, say: Say) -> None:
    settings = conversation.settings
    temperature = "the model's own" if settings.temperature is None else f"{settings.temperature:g}"
    questions = sum(message["role"] == "user" for message in conversation.messages)
    say(f"model        {conversation.model} at {settings.base_url}")
    say(f"sampling     temperature {temperature}, at most {settings.max_tokens} tokens an answer")
    say(f"system       {conversation.system or '-'}")
    say(f"so far       {questions} question{'s' * (questions != 1)}, {conversation.tokens} tokens")


def _retry(conversation: Conversation, rest: str, say: Say) -> str | None:
    question = conversation.take_back()
    if question is None:
        say("Nothing has been asked.")
    return question


def _save(conversation: Conversation, rest: str, say: Say) -> None:
    if not conversation.messages:
        say("Nothing has been said.")
        return
    file = Path(rest or f"chat-{datetime.datetime.now():%Y%m%d-%H%M%S}.md").expanduser()
    conversation.save(file)
    say(f"Saved as {file}.")


def _system(conversation: Conversation, rest: str, say: Say) -> None:
    if rest:
        conversation.system = "" if rest == "-" else rest
    say(f"System message: {conversation.system or '-'}")


def _quit(conversation: Conversation, rest: str, say: Say) -> None:
    raise Quit


COMMANDS: dict[str, tuple[Command, str]] = {
    "/help": (_help, "this list"),
    "/clear": (_clear, "forgets the conversation, but not the system message"),
    "/history": (_history, "shows the conversation"),
    "/info": (_info, "model, server, sampling, tokens so far"),
    "/retry": (_retry, "asks the last question again"),
    "/save": (_save, "/save FILE writes the conversation as Markdown, or as JSON (FILE.json)"),
    "/system": (_system, "shows the system message; /system TEXT replaces it, /system - removes it"),
    "/quit": (_quit, "ends the conversation"),
}
