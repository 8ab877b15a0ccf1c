"""Starts a real server with the plain command, and makes sure that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import requests

START_SECONDS = 180  # 12 s on two free cores; the limit only ends a hang
STOP_SECONDS = 30

# The plain command must work without any of these.
_UNSET = ("SGLANG_", "KT_", "TORCHDYNAMO_", "CUDA_")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    """The environment without anything that configures SGLang or us."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_UNSET)}


def kt_options(weights: Path, device_experts: int = 0) -> list[str]:
    """The method is left to the server, which looks into the checkpoint."""
    options = {
        "--kt-weight-path": weights,
        "--kt-cpuinfer": 2,
        "--kt-threadpool-count": 1,
        "--kt-num-gpu-experts": device_experts,
    }
    return [str(word) for option in options.items() for word in option]


class Server:
    """One server process in a process group of its own, as a shell would start it.

    `inside`: what the command line begins with, such as to run on another host.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: list[str],
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = ["-m", "sglang.launch_server", "--model", str(model), "--port", str(self.port), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*inside, sys.executable, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**clean_environment(), **(environment or {})},
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended while starting:\n{self.log_tail()}"
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
        raise AssertionError(f"the server was not healthy after {START_SECONDS} s:\n{self.log_tail()}")

    def post(self, path: str, **body: object) -> dict:
        """POST a JSON body and return the JSON answer; any HTTP error fails the test."""
        answer = requests.post(self.url + path, json=body, timeout=300)
        assert answer.ok, f"{answer.status_code} {answer.text}\n{self.log_tail()}"
        return answer.json()

    def report(self) -> dict:
        """What the server says of its experts."""
        answer = requests.get(f"{self.url}/server_info", timeout=60)
        assert answer.ok, f"{answer.status_code} {answer.text}"
        return answer.json()["internal_states"][0]["kt"]

    def processes(self) -> list[int]:
        """The ids of all processes of the group, zombies excepted."""
        members = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    members.append(int(entry.name))
        return members

    def wait_until_gone(self, seconds: float) -> int:
        """The exit status, once no process of the group is left either; any that stays fails the test.

        SGLang's launching process kills its children and at once itself. A killed process is still there
        while the kernel frees its memory: the scheduler's, on a busy machine, outlives its parent.
        """
        deadline = time.monotonic() + seconds
        status = self.process.wait(seconds)
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {[_describe(process) for process in left]}"
            time.sleep(0.05)
        return status

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _describe(process: int) -> str:
    """The id, the state and the command line, as far as they are still to be had."""
    about = Path(f"/proc/{process}")
    with contextlib.suppress(OSError):
        state = (about / "stat").read_text().rpartition(")")[2].split()[0]
        command = (about / "cmdline").read_text().replace("\0", " ")
        return f"{process} ({state}) {command[:120]}"
    return f"{process} (ended just now)"


@contextlib.contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    inside: Sequence[str] = (),
) -> Iterator[Server]:
    """A healthy server for the duration of the block."""
    server = Server(model, log, list(options), environment, inside)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.stop()
