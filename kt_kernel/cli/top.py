"""`kt top`: where the experts of a running server live and how they do, read again every second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.reading import Reading, read
from kt_kernel.cli.server_url import base_url

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from kt_kernel.cli.keys import Wait


@dataclass(frozen=True)
class TopSettings:
    """Where the server is, seconds between two readings, and how many to show (None: until Ctrl-C)."""

    host: str
    port: int
    interval: float
    readings: int | None
    api_key: str = ""

    @property
    def url(self) -> str:
        """What is read; SGLang's older name for it logs a warning with every call."""
        return f"{base_url(self.host, self.port)}/server_info"


def watch(settings: TopSettings, console: Console | None = None) -> None:
    """Show the server's experts until q or Ctrl-C, or for as many readings as asked for.

    A server that stops answering later on is waited for, and said so below the last reading. Where the output
    is no terminal, the readings follow one another, with all layers.

    Raises:
        CommandError: the first reading fails.
    """
    from rich.console import Console
    from rich.live import Live

    from kt_kernel.cli.keys import pressed_keys
    from kt_kernel.cli.top_view import view

    console = console or Console()
    first = read(settings.url, settings.api_key)
    if not console.is_terminal or settings.readings == 1:
        for before, now, trouble in _readings(settings, first, _sleep):
            console.print(view(before, now, trouble))
        return
    with pressed_keys() as wait, Live(console=console, auto_refresh=False, screen=True) as live:
        screen = Screen(live, wait)
        for before, now, trouble in _readings(settings, first, screen.pause):
            screen.show(before, now, trouble)


class Screen:
    """The newest reading in a terminal, with as many layers as fit; the rest can be scrolled to."""

    def __init__(self, live: Live, wait: Wait) -> None:
        self._live = live
        self._wait = wait
        self._first_layer = 0
        self._shown: tuple[Reading, Reading, str] | None = None

    def show(self, before: Reading, now: Reading, trouble: str) -> None:
        """Draw."""
        from kt_kernel.cli.top_view import screen_view

        self._shown = (before, now, trouble)
        text, self._first_layer = screen_view(before, now, trouble, self._first_layer, self._live.console)
        self._live.update(text, refresh=True)

    def pause(self, seconds: float) -> bool:
        """Obey keys for so long; False: q was pressed."""
        from kt_kernel.cli import keys

        end = time.monotonic() + seconds
        lines = {keys.UP: -1, keys.DOWN: 1, keys.PAGE_UP: -10, keys.PAGE_DOWN: 10}
        while (left := end - time.monotonic()) > 0:
            key = self._wait(left)
            if key in ("q", "Q"):
                return False
            if key in lines and self._shown is not None:
                self._first_layer += lines[key]
                self.show(*self._shown)
        return True


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _readings(
    settings: TopSettings, first: Reading, pause: Callable[[float], bool]
) -> Iterator[tuple[Reading, Reading, str]]:
    """(the reading before, the newest one, why there is no newer one) until it is enough."""
    before = now = first
    yield before, now, ""
    for _ in itertools.count() if settings.readings is None else range(settings.readings - 1):
        try:
            if not pause(settings.interval):
                return
            newest = read(settings.url, settings.api_key)
        except CommandError as error:
            yield before, now, str(error)
            continue
        except KeyboardInterrupt:
            return
        # A restarted server counts from zero again.
        before = now if newest.report["cpu"]["calls"] >= now.report["cpu"]["calls"] else newest
        now = newest
        yield before, now, ""
