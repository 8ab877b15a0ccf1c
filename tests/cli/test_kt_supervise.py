"""Stopping `kt run` must leave no process behind, however it is stopped and however the server takes it.

The server is a stand-in: a Python process with a child of its own, as SGLang has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE_SECONDS = 30.0  # for processes to start and end on a busy machine; reached only when a test fails

SERVER = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def finish(number, frame):
    print("finishing", flush=True)
    if {takes_its_child}:
        child.kill(); child.wait()
    sys.exit(0)
signal.signal(signal.SIGTERM, {on_term})
signal.signal(signal.SIGINT, lambda number, frame: print("interrupted", flush=True))
print(os.getpid(), child.pid, flush=True)
while True:
    time.sleep(0.05)
"""

SUPERVISOR = """
import logging, os, sys
from kt_kernel.cli import supervise
logging.basicConfig(level=logging.INFO)
supervise.GRACE_SECONDS = {grace}
sys.exit(supervise.run_until_stopped([sys.executable, "-c", sys.argv[1]], dict(os.environ)))
"""


class Supervised:
    """A supervisor in a process group of its own, with the stand-in server below it."""

    def __init__(
        self,
        directory: Path,
        on_term: str = "finish",
        takes_its_child: str = "True",
        grace: int = 600,
        ignored: tuple[signal.Signals, ...] = (),
    ) -> None:
        server = SERVER.format(on_term=on_term, takes_its_child=takes_its_child)
        self._output = directory / "output"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR.format(grace=grace), server],
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=lambda: set_dispositions(ignored),
            )
        wait_until(lambda: len(self.output.split()) >= 2)
        self.pids = [int(word) for word in self.output.split()[:2]]

    @property
    def output(self) -> str:
        return self._output.read_text()

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def all_gone(self) -> bool:
        return not any(is_alive(pid) for pid in self.pids)


def set_dispositions(ignored: tuple[signal.Signals, ...]) -> None:
    """Whatever this test run itself was started with (nohup, a script's background job)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie only waits for init


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.02)


@pytest.fixture
def supervised(tmp_path):
    """A factory; whatever it started is gone after the test."""
    started: list[Supervised] = []

    def start(**options) -> Supervised:
        started.append(Supervised(tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        for pid in (one.process.pid, *one.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


def test_ctrl_c_lets_the_server_finish(supervised):
    server = supervised()
    server.press_ctrl_c()
    assert server.process.wait(PATIENCE_SECONDS) == 0
    assert "finishing" in server.output
    assert "interrupted" not in server.output  # the signal itself never reached it
    wait_until(server.all_gone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_service_managers_and_closed_terminals_stop_it_too(supervised, number):
    server = supervised()
    server.process.send_signal(number)
    assert server.process.wait(PATIENCE_SECONDS) == 0
    wait_until(server.all_gone)


def test_background_job_of_a_script_can_be_interrupted(supervised):
    server = supervised(ignored=(signal.SIGINT,))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE_SECONDS) == 0
    wait_until(server.all_gone)


def test_nohup_survives_the_terminal(supervised):
    server = supervised(ignored=(signal.SIGHUP,))
    server.process.send_signal(signal.SIGHUP)
    server.press_ctrl_c()  # handled after the hang-up, which must have had no effect
    assert server.process.wait(PATIENCE_SECONDS) == 0
    assert server.output.count("stopping") == 1
    assert "finishing" in server.output


def test_children_that_outlive_the_server_are_killed(supervised):
    server = supervised(takes_its_child="False")
    server.press_ctrl_c()
    assert server.process.wait(PATIENCE_SECONDS) == 0
    wait_until(server.all_gone)


def test_second_ctrl_c_kills_a_server_that_does_not_listen(supervised):
    server = supervised(on_term="signal.SIG_IGN")
    server.press_ctrl_c()
    wait_until(lambda: "stopping" in server.output)
    assert is_alive(server.pids[0])
    server.press_ctrl_c()
    assert server.process.wait(PATIENCE_SECONDS) == 0
    wait_until(server.all_gone)


def test_server_that_does_not_listen_is_killed_after_the_grace_period(supervised):
    server = supervised(on_term="signal.SIG_IGN", grace=1)
    server.press_ctrl_c()
    assert server.process.wait(PATIENCE_SECONDS) == 0
    wait_until(server.all_gone)


def test_killed_supervisor_takes_the_server_along(supervised):
    server = supervised()
    server.process.kill()
    wait_until(server.all_gone)


def test_crash_of_the_server_is_reported_and_cleaned_up(supervised):
    server = supervised()
    os.kill(server.pids[0], signal.SIGKILL)
    assert server.process.wait(PATIENCE_SECONDS) == 128 + signal.SIGKILL
    wait_until(server.all_gone)
