"""A model in a server of its own for as long as a benchmark runs, and the times of requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS, _STOP_SECONDS = 600, 30


@dataclass(frozen=True)
class ServedModel:
    """`vocabulary`: tokens of prompts are below it."""

    url: str
    vocabulary: int

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> float:
        """Seconds of one greedy request; the prompt is never in the cache."""
        ids = [3 + (seed * 7919 + place * 104729) % (self.vocabulary - 3) for place in range(prompt_tokens)]
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = json.dumps({"input_ids": ids, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{self.url}/generate", body, {"Content-Type": "application/json"})
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as reply:
            json.load(reply)
        return time.perf_counter() - begin

    def seconds_per_token(self, prompt_tokens: int, new_tokens: int, seed: int) -> float:
        """Of decoding one stream: what more tokens take longer."""
        first = self.generate(prompt_tokens, 1, seed)
        return (self.generate(prompt_tokens, 1 + new_tokens, seed) - first) / new_tokens

    def tokens_per_second(self, streams: int, prompt_tokens: int, new_tokens: int, seed: int) -> float:
        """Of all streams together, their prompts included."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            for _ in pool.map(lambda i: self.generate(prompt_tokens, new_tokens, seed + i), range(streams)):
                pass
        return streams * new_tokens / (time.perf_counter() - begin)


@contextlib.contextmanager
def served(
    model: Path, options: Sequence[str], vocabulary: int, environment: Mapping[str, str]
) -> Iterator[ServedModel]:
    """`python -m sglang.launch_server` with these options until the block ends, without a prefix cache.

    Raises RuntimeError with the log's last lines if it ends while starting.
    """
    with started(model, ["--disable-radix-cache", *options], environment) as (url, _):
        yield ServedModel(url, vocabulary)


@contextlib.contextmanager
def started(
    model: Path, options: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The server's address and its first process, which leads a process group of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu"]
    command += ["--port", str(port), "--skip-tokenizer-init", *options]
    log = Path(f"/tmp/kt-bench-{port}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        log.unlink(missing_ok=True)


def _wait(process: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(health, timeout=5)
            return
        time.sleep(0.3)
    raise RuntimeError("the server did not start:\n" + "\n".join(log.read_text().splitlines()[-30:]))
