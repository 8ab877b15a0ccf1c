"""One answer: its pieces while they arrive, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Screen(Protocol):
    """Where pieces go."""

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks before it answers."""

    def content(self, text: str) -> None:
        """A piece of the answer."""


@dataclass
class Answer:
    """`begin`, `first`, `last`: seconds of a clock; `first` and `last` are None before the first piece."""

    begin: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    content: str = ""
    reasoning: str = ""
    pieces: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cut: str = ""  # why it is not complete

    def take(self, events: Iterable[Any], screen: Screen) -> None:
        """Show and keep the pieces of a streamed completion, and the tokens it says it has used."""
        for event in events:
            if event.usage is not None:
                self.prompt_tokens = event.usage.prompt_tokens
                self.completion_tokens = event.usage.completion_tokens
            for choice in event.choices[:1]:
                self._take_piece(choice.delta, screen)
                if choice.finish_reason == "length":
                    self.cut = "cut at the length limit"

    def _take_piece(self, delta: Any, screen: Screen) -> None:
        reasoning = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""
        content = delta.content or ""
        if not reasoning and not content:
            return
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.pieces += 1
        if reasoning:
            self.reasoning += reasoning
            screen.reasoning(reasoning)
        if content:
            self.content += content
            screen.content(content)

    def times(self) -> str:
        """Tokens, seconds to the first one, and tokens per second after it."""
        if self.first is None or self.last is None:
            return "no text"
        # A stopped answer has no count of its tokens; most pieces are one.
        tokens = self.completion_tokens or self.pieces
        about = "" if self.completion_tokens else "about "
        parts = [f"{about}{tokens} tokens", f"first after {self.first - self.begin:.2f} s"]
        if tokens > 1 and self.last > self.first:
            parts.append(f"then {(tokens - 1) / (self.last - self.first):.1f} tokens/s")
        if self.cut:
            parts.append(self.cut)
        return ", ".join(parts)
