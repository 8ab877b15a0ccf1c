"""`kt chat`: a conversation with a running OpenAI-compatible server, streamed as it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_kernel.cli.errors import CommandError

if TYPE_CHECKING:
    from openai import OpenAI
    from rich.console import Console


@dataclass(frozen=True)
class ChatSettings:
    """Where to connect and how to sample; an empty model means the one being served.

    Without a temperature the server uses the model's own.
    """

    host: str
    port: int
    model: str
    system: str
    temperature: float | None
    max_tokens: int

    @property
    def base_url(self) -> str:
        """The API root, with the brackets an IPv6 address needs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


class Conversation:
    """The messages so far, and the server that continues them."""

    def __init__(self, client: OpenAI, settings: ChatSettings, model: str) -> None:
        self._client = client
        self._settings = settings
        self._model = model
        self._messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        system = self._settings.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, console: Console) -> None:
        """Print the answer to `text` while it arrives.

        Ctrl-C cuts the answer short and keeps what came.  A question the server fails to answer is
        forgotten, so that it can be asked again.
        """
        import openai

        self._messages.append({"role": "user", "content": text})
        answer = ""
        sampling = {"max_tokens": self._settings.max_tokens}
        if self._settings.temperature is not None:
            sampling["temperature"] = self._settings.temperature
        try:
            with self._client.chat.completions.create(
                model=self._model,
                messages=self._messages,
                stream=True,
                **sampling,
            ) as stream:
                for event in stream:
                    piece = (event.choices[0].delta.content or "") if event.choices else ""
                    answer += piece
                    console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            console.out(" (stopped)", end="")
        except openai.OpenAIError as error:
            self._messages.pop()
            console.out(f"\nThe server did not answer: {error}")
            return
        console.out("")
        self._messages.append({"role": "assistant", "content": answer})


def converse(settings: ChatSettings) -> None:
    """Read questions until /quit or the end of input.

    Raises:
        CommandError: no server answers there.
    """
    from openai import OpenAI, OpenAIError
    from rich.console import Console

    # A local server needs no key, but the client insists on one.
    client = OpenAI(base_url=settings.base_url, api_key="none", max_retries=0)
    try:
        model = settings.model or client.models.list().data[0].id
    except (OpenAIError, IndexError) as error:
        raise CommandError(
            f"No server answers at {settings.base_url} ({error}): start one with kt run, or name it with "
            "--host and --port."
        ) from error
    console = Console()
    console.out(f"{model} at {settings.base_url}; /clear forgets the conversation, /quit ends it.")
    conversation = Conversation(client, settings, model)
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.out("")
            return
        if text == "/quit":
            return
        if text == "/clear":
            conversation.clear()
            console.out("Forgotten.")
        elif text.startswith("/"):
            console.out(f"There is no command {text}: /clear, /quit.")
        elif text:
            conversation.ask(text, console)
