"""The terminal shows a server's start in a few lines, and loses nothing that a person must see."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys

import pytest

from kt_kernel.cli import server_log, start
from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.exposure import exposure_warning

OPTIONS = ["--port", "31000", "--kt-method", "BF16", "--kt-cpuinfer", "2"]

# Prints as a server does; two processes of it say the same of an error.
STAND_IN = """
import sys
for number in range(250):
    print(f"[2026-11-30 11:08:{number % 60:02}] something about layer {number}", flush=True)
print("[2026-11-30 11:08:25] Load weight begin. avail mem=17 GB", flush=True)
if sys.argv[1] == "fail":
    print("[2026-11-30 11:08:26] error: the weights are damaged", file=sys.stderr, flush=True)
    print("[2026-11-30 11:08:27] error: the weights are damaged", file=sys.stderr, flush=True)
    sys.exit(3)
print("[2026-11-30 11:08:38] The server is fired up and ready to roll!", flush=True)
print('[2026-11-30 11:08:39] INFO:  127.0.0.1:4 - "POST /generate HTTP/1.1" 500 Internal Server Error')
"""


@pytest.fixture
def quiet_signals(monkeypatch):
    """The supervisor takes the signals of its process; here that is pytest's."""
    monkeypatch.setattr("kt_kernel.cli.supervise.signal.signal", lambda *arguments: None)


def run(ending: str, caplog: pytest.LogCaptureFixture, host: str = "127.0.0.1") -> tuple[int, list[str]]:
    caplog.set_level(logging.INFO, logger="kt_kernel")
    status = start.run_with_banner(
        "demo", [sys.executable, "-c", STAND_IN, ending, "--host", host, *OPTIONS], {}
    )
    return status, caplog.messages


def test_a_start_is_a_few_lines_and_the_rest_is_in_the_file(monkeypatch, caplog, empty_cache, quiet_signals):
    monkeypatch.setenv(server_log.SWITCH, "file")
    status, lines = run("serve", caplog)
    log = empty_cache / "logs" / "server-31000.log"
    assert status == 0
    assert lines[:4] == [
        "starting demo: method BF16, 2 threads",
        "http://127.0.0.1:31000/v1 answers when it is ready; Ctrl-C stops it",
        "http://127.0.0.1:31000/kt shows it in a browser",
        f"log: {log}",
    ]
    assert lines[4] == "loading the weights" and lines[5].startswith("ready after ") and len(lines) == 6
    assert len(log.read_text().splitlines()) == 253


def test_errors_reach_the_terminal_once_with_the_end_of_the_log(
    monkeypatch, caplog, empty_cache, quiet_signals
):
    monkeypatch.setenv(server_log.SWITCH, "file")
    status, lines = run("fail", caplog)
    assert status == 3
    shown = [line for line in lines if line.endswith("error: the weights are damaged")]
    assert len(shown) == 3  # as it comes, and twice in the log's end
    assert any("ended with status 3" in line and "server-31000.log" in line for line in lines)


def test_where_nobody_watches_the_log_goes_where_it_went(
    monkeypatch, caplog, capfd, empty_cache, quiet_signals
):
    monkeypatch.delenv(server_log.SWITCH, raising=False)
    status, lines = run("serve", caplog)
    assert status == 0 and len(lines) == 3 and not empty_cache.exists()
    assert len(capfd.readouterr().out.splitlines()) == 253


def test_a_log_that_cannot_be_made_does_not_keep_the_server_from_starting(
    monkeypatch, caplog, capfd, empty_cache, quiet_signals
):
    monkeypatch.setenv(server_log.SWITCH, "file")
    empty_cache.parent.mkdir()
    empty_cache.write_text("a file where the folder should be")
    status, lines = run("serve", caplog)
    assert status == 0
    assert (
        lines[3].startswith("warning: no log file, so the log comes here: ") and str(empty_cache) in lines[3]
    )
    assert len(capfd.readouterr().out.splitlines()) == 253


def test_the_log_of_a_server_that_ended_is_kept_once(monkeypatch, caplog, empty_cache, quiet_signals):
    monkeypatch.setenv(server_log.SWITCH, "file")
    run("fail", caplog)
    run("serve", caplog)
    folder = empty_cache / "logs"
    assert "the weights are damaged" in (folder / "server-31000.log.1").read_text()
    assert "ready to roll" in (folder / "server-31000.log").read_text()
    run("serve", caplog)
    assert sorted(path.name for path in folder.iterdir()) == ["server-31000.log", "server-31000.log.1"]


def test_a_second_server_at_a_port_leaves_the_log_of_the_running_one(
    monkeypatch, caplog, empty_cache, quiet_signals
):
    monkeypatch.setenv(server_log.SWITCH, "file")
    path, output = server_log.new_log("31000")
    output.write("all is well\n")
    output.flush()
    server = subprocess.Popen(["sleep", "60"], stdout=output)
    output.close()  # what remains is the server, as when `kt run` was killed
    try:
        for _ in range(2):
            run("fail", caplog)
        assert path.read_text() == "all is well\n"
        names = sorted(path.name for path in path.parent.iterdir())
        assert names == ["server-31000-2.log", "server-31000-2.log.1", "server-31000.log"]
    finally:
        server.kill()
        server.wait()
    assert server_log.new_log("31000")[0] == path


def test_the_log_is_its_owners_alone(empty_cache):
    folder = empty_cache / "logs"
    folder.mkdir(parents=True)
    old = folder / "server-31000.log"
    old.write_text("of an earlier version")
    old.chmod(0o644)
    path, output = server_log.new_log("31000")
    output.close()
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, folder / "server-31000.log.1")] == [
        0o600
    ] * 2


def test_an_ipv6_address_is_shown_as_a_url(monkeypatch, caplog, empty_cache, quiet_signals):
    monkeypatch.setenv(server_log.SWITCH, "file")
    _, lines = run("serve", caplog, host="::1")
    assert lines[1].startswith("http://[::1]:31000/v1 answers")


def test_the_variable_decides_and_is_checked(monkeypatch):
    monkeypatch.setenv(server_log.SWITCH, "terminal")
    assert not server_log.wants_file()
    monkeypatch.setenv(server_log.SWITCH, "fiel")
    with pytest.raises(CommandError, match="KT_SERVER_LOG is 'fiel', expected file or terminal"):
        server_log.wants_file()


def test_a_terminal_gets_the_short_form(monkeypatch):
    monkeypatch.delenv(server_log.SWITCH, raising=False)
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert server_log.wants_file()
    os.close(leader)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("torch.OutOfMemoryError: CPU out of memory", True),
        ("Traceback (most recent call last):", True),
        ("[11:08] error: the port is taken", True),
        ("[11:08] Prefill batch, #new-seq: 1", False),
        ("[11:08] Ignore import error when loading sglang.srt.models.inkling: No module", False),
        ("[11:08] [http_server] Error: the prompt is empty", False),
        ('INFO: 127.0.0.1:4 - "POST /generate HTTP/1.1" 500 Internal Server Error', False),
    ],
)
def test_trouble_is_shown_and_traffic_is_not(line, shown):
    assert (server_log.line_for_terminal(line, 1.0) is not None) == shown


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [
        ("127.0.0.1", None, False),
        ("127.0.0.2", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        (None, None, False),
        ("0.0.0.0", "secret", False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.1.5", None, True),
        ("myhost", None, True),
    ],
)
def test_open_to_the_network_without_a_key_is_said(host, key, warned):
    warning = exposure_warning(host, key)
    assert (warning is not None) == warned
    assert not warned or warning.startswith(f"--host {host} without --api-key")


def test_the_start_says_it(monkeypatch, caplog, empty_cache, quiet_signals):
    monkeypatch.setenv(server_log.SWITCH, "file")
    _, lines = run("serve", caplog, host="0.0.0.0")
    assert any(line.startswith("warning: --host 0.0.0.0 without --api-key") for line in lines)
