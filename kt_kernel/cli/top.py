"""`kt top`: where the experts of a running server live and how they do, read again every second."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kt_kernel.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

# SGLang answers between two batches; one chunk of a long prompt on a slow CPU takes seconds.
TIMEOUT_SECONDS = 30

Report = dict[str, Any]

# What is shown, of `kt_kernel.hybrid.report`.
_FIGURES = {
    "layers",
    "experts",
    "device_experts",
    "hit_rate",
    "updates",
    "experts_moved",
    "bytes_copied",
    "bytes",
    "prefill",
    "cpu",
    "deferred",
    "miss_policy",
}


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
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/server_info"


@dataclass(frozen=True)
class Reading:
    """One answer of the server: its model's name, the experts' report, and when it came (seconds)."""

    model: str
    report: Report
    time: float


def read(url: str) -> Reading:
    """Ask the server once.

    Raises:
        CommandError: nothing answers there, or the server runs no experts of ours.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            info = json.load(answer)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"No server answers at {url} ({error}): start one with kt run, or name it with --host and --port."
        ) from error
    report = _find_report(info)
    if report is None:
        raise CommandError(
            f"The server at {url} reports no experts of kt-kernel: start it with kt run, or with "
            "--kt-weight-path."
        )
    missing = sorted(_FIGURES - report.keys())
    if missing:
        raise CommandError(
            f"The report of the server at {url} lacks {', '.join(missing)}: it runs another version of "
            "kt-kernel; use the kt command of that version."
        )
    return Reading(str(info.get("served_model_name") or info.get("model_path")), report, time.monotonic())


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


def _find_report(info: Any) -> Report | None:
    """At the top of the answer, or in the state of the first scheduler that has one."""
    if not isinstance(info, dict):
        return None
    states = [info, *(info.get("internal_states") or ())]
    return next((state["kt"] for state in states if isinstance(state, dict) and state.get("kt")), None)
