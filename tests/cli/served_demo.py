"""A running `kt run demo`, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from openai import OpenAI

START_SECONDS = 300.0  # 17 to 26 s on two busy cores; reached only when the server hangs
STOP_SECONDS = 60.0

# Tools, and what Prometheus reads, are off unless asked for.
OPTIONS = ("--tool-call-parser", "qwen25", "--enable-metrics")


class Demo:
    """A running `kt run demo` in a process group of its own."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("kt"), "run", "demo", "--port", str(self.port), *OPTIONS],
                env=os.environ | {"XDG_CACHE_HOME": str(checkpoint.parents[1])},
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health_generate", timeout=10)
                return
            time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def descendants(self) -> list[int]:
        """Process ids below `kt`, read from /proc."""
        children: dict[int, list[int]] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = status.read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(status.parent.name))
        found, frontier = [], [self.process.pid]
        while frontier:
            frontier = [child for parent in frontier for child in children.get(parent, [])]
            found += frontier
        return found

    def stop(self) -> int:
        os.killpg(self.process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        return self.process.wait(STOP_SECONDS)


def wait_until_gone(processes: list[int]) -> None:
    """A killed process is still listed while the kernel frees its memory."""
    deadline = time.monotonic() + STOP_SECONDS
    while left := [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)
