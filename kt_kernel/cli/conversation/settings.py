"""Where `kt chat` connects and how it samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kt_kernel.cli.server_url import base_url


@dataclass(frozen=True)
class ChatSettings:
    """An empty model means the one being served; without a temperature the server uses the model's own."""

    host: str
    port: int
    model: str
    system: str
    temperature: float | None
    max_tokens: int
    api_key: str = ""

    @property
    def base_url(self) -> str:
        """The API's root."""
        return f"{base_url(self.host, self.port)}/v1"

    @property
    def sampling(self) -> dict[str, Any]:
        """What a request says of it."""
        chosen: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.temperature is not None:
            chosen["temperature"] = self.temperature
        return chosen
