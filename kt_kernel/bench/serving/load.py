"""Load of a given number of users: each asks, waits for the end of the answer, and asks again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from kt_kernel.bench.serving.figures import Figures, Level, figures
from kt_kernel.bench.serving.prompts import Prompts
from kt_kernel.bench.serving.requests import RequestError, Sample, Server

_REQUESTS_PER_USER = 2
_LEAST_REQUESTS = 4


def requests_of(level: Level, wanted: int | None) -> int:
    """How many a level gets: what was asked for, else two a user and at least four."""
    return max(level.users, wanted or max(_LEAST_REQUESTS, _REQUESTS_PER_USER * level.users))


async def warm_up(server: Server, prompts: Prompts) -> None:
    """Two requests that are not counted; the server's count of their tokens fits later prompts to size.

    Raises:
        RequestError: the server does not answer them.
    """
    counts = [(await server.complete(text, 4)).prompt_tokens for text in prompts.calibration()]
    prompts.calibrate(counts)


@dataclass
class Run:
    """A level while it is measured: `failures` are sentences."""

    level: Level
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    def figures(self) -> Figures:
        """Of what has finished so far."""
        return figures(self.level, self.samples, len(self.failures), time.perf_counter() - self.begin)


async def measure(
    server: Server, prompts: Prompts, levels: Sequence[Level], requests: int | None
) -> AsyncIterator[Run]:
    """Each level when it is finished; when cancelled, the one that was not, and then no more."""
    for level in levels:
        texts = [prompts.text(level.prompt_tokens) for _ in range(requests_of(level, requests))]
        run = Run(level)
        try:
            await _run(server, run, texts)
        except asyncio.CancelledError:
            yield run
            return
        yield run


async def _run(server: Server, run: Run, texts: list[str]) -> None:
    async def user() -> None:
        while texts:
            try:
                run.samples.append(await server.complete(texts.pop(), run.level.output_tokens))
            except RequestError as error:
                run.failures.append(str(error))

    async with asyncio.TaskGroup() as users:
        for _ in range(run.level.users):
            users.create_task(user())
