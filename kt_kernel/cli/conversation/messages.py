"""The messages so far, and the server that continues them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kt_kernel.cli.conversation.answer import Answer, Screen
from kt_kernel.cli.conversation.settings import ChatSettings
from kt_kernel.cli.errors import CommandError

if TYPE_CHECKING:
    from openai import OpenAI

Message = dict[str, str]
_NAMES = {"system": "System", "user": "You", "assistant": "Model"}


class Conversation:
    """Messages of a system message, of questions and of answers; reasoning is shown and not sent again."""

    def __init__(self, client: OpenAI, settings: ChatSettings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.system = settings.system
        self.tokens = 0
        """Of the last exchange: its prompt, which holds all before it, and its answer."""
        self._client = client
        self._exchanges: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All of them, the system message first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self._exchanges]

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._exchanges = []
        self.tokens = 0

    def ask(self, text: str, screen: Screen) -> Answer:
        """The answer to `text`, shown while it arrives.

        Ctrl-C cuts the answer short and keeps what came. A question without any answer is forgotten, so that
        it can be asked again.

        Raises:
            CommandError: the server did not answer.
        """
        import openai

        self._exchanges.append({"role": "user", "content": text})
        answer = Answer()
        try:
            with self._client.chat.completions.create(
                model=self.model,
                messages=self.messages,
                stream=True,
                stream_options={"include_usage": True},
                **self.settings.sampling,
            ) as stream:
                answer.take(stream, screen)
        except KeyboardInterrupt:
            answer.cut = "stopped"
        # In the middle of a stream the client passes on what happens to the connection, or JSON that is none.
        except (openai.OpenAIError, OSError, ValueError, _transport_error()) as error:
            self._exchanges.pop()
            raise CommandError(f"The server did not answer: {error}") from error
        if answer.content:
            self._exchanges.append({"role": "assistant", "content": answer.content})
        else:
            self._exchanges.pop()
        self.tokens = (answer.prompt_tokens or 0) + (answer.completion_tokens or answer.pieces)
        return answer

    def take_back(self) -> str | None:
        """Forget the last question and its answer; returns the question, None if there is none."""
        if not self._exchanges:
            return None
        question = self._exchanges[-2]["content"]
        del self._exchanges[-2:]
        return question

    def text(self) -> str:
        """All messages, each under the name of who said it."""
        return "\n\n".join(f"## {_NAMES[m['role']]}\n\n{m['content']}" for m in self.messages)

    def save(self, file: Path) -> None:
        """As JSON (an API's list of messages) where the name ends in .json, else as Markdown.

        Raises:
            CommandError: there is such a file already, or it cannot be written.
        """
        is_json = file.suffix == ".json"
        text = json.dumps(self.messages, indent=1, ensure_ascii=False) if is_json else self.text()
        try:
            with file.open("x", encoding="utf-8") as output:
                output.write(text + "\n")
        except FileExistsError:
            raise CommandError(f"{file} exists already: give another name") from None
        except OSError as error:
            raise CommandError(f"{file} cannot be written ({error.strerror})") from error


def _transport_error() -> type[Exception]:
    import httpx

    return httpx.HTTPError
