"""Greedy answers, and whether two of them are the same but for ties."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import requests
from server import Server


@dataclass(frozen=True)
class Answer:
    """`margins`: by how much each token's log-probability was above the second best's."""

    tokens: list[int]
    margins: list[float]
    cached: int = 0

    def differs_from(self, other: Answer, tie: float) -> str | None:
        """Where the tokens part although this answer was not undecided between two, within `tie`."""
        assert len(self.tokens) == len(other.tokens)
        pairs = zip(self.tokens, other.tokens, strict=True)
        first = next((i for i, (mine, others) in enumerate(pairs) if mine != others), None)
        if first is None or self.margins[first] < tie:
            return None
        return f"token {first} of {len(self.tokens)} differs, where the margin was {self.margins[first]:.3f}"


def greedy(server: Server, prompt: str | list[int], tokens: int) -> Answer:
    """One token a step, the most probable."""
    reply = server.post("/generate", **_request(prompt, tokens))
    info = reply["meta_info"]
    return Answer(reply["output_ids"], _margins(info), info["cached_tokens"])


def streamed(server: Server, prompt: str | list[int], tokens: int) -> Answer:
    """The same, token by token."""
    *_, last = events(server, prompt, tokens)
    return Answer(last["output_ids"], _margins(last["meta_info"]))


def events(server: Server, prompt: str | list[int], tokens: int, **options: object) -> Iterator[dict]:
    """What the server sends of an answer as it grows."""
    body = {**_request(prompt, tokens), **options, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as reply:
        assert reply.ok, reply.text
        for line in reply.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])


def _request(prompt: str | list[int], tokens: int) -> dict[str, object]:
    return {
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


def _margins(info: dict) -> list[float]:
    return [best[0] - second[0] for best, second in info["output_top_logprobs"]]
