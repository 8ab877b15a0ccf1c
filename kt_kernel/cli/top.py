"""`kt top`: where the experts of a running server live and how they do, read again every second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.reading import Reading, read
from kt_kernel.cli.server_url import base_url

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TopSettings:
    """Where the server is, seconds between two readings, and how many to show (None: until Ctrl-C)."""

    host: str
    port: int
    interval: float
    readings: int | None

    @property
    def url(self) -> str:
        """What is read; SGLang's older name for it logs a warning with every call."""
        return f"{base_url(self.host, self.port)}/server_info"


def watch(settings: TopSettings, console: Console | None = None) -> None:
    """Show the server's experts until Ctrl-C, or for as many readings as asked for.

    A server that stops answering later on is waited for, and said so below the last reading. Where the output
    is no terminal, the readings follow one another.

    Raises:
        CommandError: the first reading fails.
    """
    from rich.console import Console
    from rich.live import Live

    from kt_kernel.cli.top_view import view

    console = console or Console()
    first = read(settings.url)
    if not console.is_terminal or settings.readings == 1:
        for before, now, trouble in _readings(settings, first):
            console.print(view(before, now, trouble))
        return
    with Live(view(first, first), console=console, auto_refresh=False, screen=True) as live:
        for before, now, trouble in _readings(settings, first):
            live.update(view(before, now, trouble), refresh=True)


def _readings(settings: TopSettings, first: Reading) -> Iterator[tuple[Reading, Reading, str]]:
    """(the reading before, the newest one, why there is no newer one) until it is enough."""
    before = now = first
    yield before, now, ""
    for _ in itertools.count() if settings.readings is None else range(settings.readings - 1):
        try:
            time.sleep(settings.interval)
            newest = read(settings.url)
        except CommandError as error:
            yield before, now, str(error)
            continue
        except KeyboardInterrupt:
            return
        # A restarted server counts from zero again.
        before = now if newest.report["cpu"]["calls"] >= now.report["cpu"]["calls"] else newest
        now = newest
        yield before, now, ""
