"""One streamed completion, timed at this end of the connection."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from kt_kernel.errors import KTError


class RequestError(KTError):
    """The server refused a request, cut it off, or could not be reached."""


@dataclass
class Sample:
    """Seconds of a clock: when the request went out, and when each piece of the answer came."""

    begin: float
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        """From the request to the first piece."""
        return self.pieces[0] - self.begin

    @property
    def seconds_per_token(self) -> float | None:
        """After the first one, which the prompt delays; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces; a server may send several tokens in one."""
        return [late - early for early, late in zip(self.pieces, self.pieces[1:], strict=False)]


class Server:
    """An OpenAI-compatible server's completions: `model` "" is the first that it lists."""

    def __init__(self, base_url: str, model: str, api_key: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Answers take as long as they take; only a server that cannot be reached is given up.
        timeout = httpx.Timeout(None, connect=10)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout, limits=limits)
        self.base_url = base_url
        self.model = model

    async def find_model(self) -> None:
        """Ask for the model's name where none was given.

        Raises:
            RequestError: no server answers, or it lists no model.
        """
        if self.model:
            return
        try:
            answer = await self._client.get("/v1/models", timeout=30)
            answer.raise_for_status()
            self.model = answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise RequestError(
                f"No server answers at {self.base_url} ({error}): start one with kt run, or name it "
                "with --host and --port."
            ) from error

    async def complete(self, prompt: str, tokens: int) -> Sample:
        """A completion of exactly `tokens` tokens (SGLang and others go on past an end if told to).

        Raises:
            RequestError: there was none, or it has no count of tokens.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sample = Sample(time.perf_counter())
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    raise RequestError(f"the server answered {answer.status_code}: {_reason(answer)}")
                async for event in _events(answer):
                    _take(sample, event)
        except httpx.HTTPError as error:
            raise RequestError(f"the connection failed: {type(error).__name__} {error}") from error
        if not sample.pieces or not sample.output_tokens:
            raise RequestError("the server's answer has no text or no usage, so its tokens cannot be counted")
        return sample

    async def close(self) -> None:
        """End the connections."""
        await self._client.aclose()


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each line of a stream of server-sent events."""
    async for line in answer.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield _event(data)


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise RequestError(f"the server sent an event that is no JSON object: {data[:100]!r}")
    return event


def _reason(answer: httpx.Response) -> str:
    """What the server says of it, as one short line."""
    try:
        text = str(answer.json()["message"])
    except (ValueError, LookupError, TypeError):
        text = answer.text
    return " ".join(text.split())[:300]


def _take(sample: Sample, event: dict[str, Any]) -> None:
    if "error" in event:
        raise RequestError(f"the server broke off: {event['error']}")
    if event.get("choices"):
        sample.pieces.append(time.perf_counter())
    if usage := event.get("usage"):
        try:
            sample.prompt_tokens = int(usage["prompt_tokens"])
            sample.output_tokens = int(usage["completion_tokens"])
        except (LookupError, TypeError, ValueError):
            raise RequestError(f"the server's count of tokens cannot be read: {str(usage)[:100]}") from None
