"""Reads the scheduler's figures for those who look: one question at a time, and none while nobody does.

The scheduler answers between two batches: a chunk of a long prompt on a slow CPU takes seconds. Whoever
cannot wait so long gets the last answer with its age.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

FRESH_SECONDS = 1.0

State = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The internal states of all schedulers, and when they came (time.monotonic)."""

    states: list[State]
    time: float

    @property
    def age(self) -> float:
        return time.monotonic() - self.time


class StatusReader:
    """`ask` brings the internal states; all calls are made in one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[list[State]]], fresh: float = FRESH_SECONDS) -> None:
        self._ask = ask
        self._fresh = fresh
        self._last: Answer | None = None
        self._asking: asyncio.Task[None] | None = None

    async def read(self, patience: float) -> Answer | None:
        """An answer that is fresh, or the last one after `patience` seconds; None if there never was one."""
        if self._last is not None and self._last.age < self._fresh:
            return self._last
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._refresh())
        # Not cancelled when the patience ends: SGLang would take the late answer for the next one.
        await asyncio.wait({self._asking}, timeout=patience)
        return self._last

    async def _refresh(self) -> None:
        try:
            states = await self._ask()
        except Exception as error:  # whatever it is, whoever looks sees the age of the last answer
            logger.warning("the scheduler cannot be asked for its figures: %s", error)
            return
        self._last = Answer(states, time.monotonic())
