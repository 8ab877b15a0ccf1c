"""`kt bench serve`: latency and throughput of a running server at several numbers of users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kt_kernel.cli.bench import INTERRUPTED
from kt_kernel.cli.errors import CommandError

if TYPE_CHECKING:
    from kt_kernel.bench.serving.figures import Figures, Level
    from kt_kernel.bench.serving.requests import Server

_SEED = 20261130


@dataclass(frozen=True)
class ServeBench:
    """What to measure and where. `requests`: of each level, None for two a user and at least four."""

    base_url: str
    model: str
    api_key: str
    levels: tuple[Level, ...]
    requests: int | None
    png: Path | None


def levels(users: str, prompt_tokens: str, output_tokens: str) -> tuple[Level, ...]:
    """Every combination, users last.

    Raises:
        CommandError: a list that is none.
    """
    from kt_kernel.bench.serving.figures import Level

    return tuple(
        Level(user_count, prompt, output)
        for prompt in numbers("--prompt-tokens", prompt_tokens)
        for output in numbers("--output-tokens", output_tokens)
        for user_count in numbers("--users", users)
    )


def numbers(option: str, text: str) -> list[int]:
    """ "1,4" -> [1, 4], without doubles, in order.

    Raises:
        CommandError: something else.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise CommandError(f"{option} is {text!r}, expected numbers from 1 on with commas: 1,4,16")
    return sorted({int(part) for part in parts})


def measure_server(
    bench: ServeBench, show: Callable[[Figures, str], None], head: Callable[[str], None]
) -> int:
    """Call `head` with the model's name and `show` with each level as it is finished.

    Returns the exit status: 0, 1 if a request failed, 130 after Ctrl-C, which shows what was finished.

    Raises:
        KTError: the server does not answer, or a chart was asked for that cannot be drawn.
    """
    from kt_kernel.bench.serving import report
    from kt_kernel.bench.serving.requests import Server

    if bench.png:
        report.check_chart(bench.png)
    server = Server(bench.base_url, bench.model, bench.api_key)
    done: list[Figures] = []
    status = asyncio.run(_measure(bench, server, done, show, head))
    if bench.png and done:
        try:
            report.draw(bench.png, f"{server.model} at {bench.base_url}", done)
        except (OSError, ValueError) as error:
            raise CommandError(f"{bench.png} cannot be written ({error})") from error
    return status


async def _measure(
    bench: ServeBench,
    server: Server,
    done: list[Figures],
    show: Callable[[Figures, str], None],
    head: Callable[[str], None],
) -> int:
    from kt_kernel.bench.serving.load import measure, requests_of, warm_up
    from kt_kernel.bench.serving.prompts import Prompts

    prompts = Prompts(_SEED)
    failure = ""
    try:
        await server.find_model()
        await warm_up(server, prompts)
        head(server.model)
        async for run in measure(server, prompts, bench.levels, bench.requests):
            done.append(run.figures())
            show(done[-1], server.model)
            failure = failure or next(iter(run.failures), "")
            if len(run.samples) + len(run.failures) < requests_of(run.level, bench.requests):
                typer.echo("kt: stopped; the last line is of the requests that had finished", err=True)
                return INTERRUPTED
    except asyncio.CancelledError:
        return INTERRUPTED
    finally:
        await server.close()
    if failure:
        failed = sum(figures.failed for figures in done)
        typer.echo(f"kt: {failed} requests failed; the first: {failure}", err=True)
    return int(bool(failure))
