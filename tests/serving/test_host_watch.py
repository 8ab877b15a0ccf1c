"""A host that is gone ends the others with a sentence; one that is only slow does not; strangers stay out."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

from kt_kernel.integrations.sglang import host_address, host_watch
from kt_kernel.integrations.sglang.host_address import own_address
from kt_kernel.integrations.sglang.host_watch import HostWatch

_LONG = 60  # far more than anything here takes on a busy machine
TOKEN = b"0123456789abcdef"


@pytest.fixture
def ends():
    """The watched end of a connection, the other host's, and what is set when the server would end."""
    mine, other = socket.socketpair()
    ended = threading.Event()
    yield mine, other, ended
    mine.close()
    other.close()


def test_a_connection_that_closes_ends_the_server_with_a_sentence(ends, caplog):
    mine, other, ended = ends
    HostWatch(mine, "host 1 (10.0.0.2)", ended.set, to_end=0)
    other.close()
    assert ended.wait(_LONG)
    assert "host 1 (10.0.0.2) has ended, so this server ends, too" in caplog.text


def test_silence_ends_the_server_though_nothing_is_closed(ends, caplog):
    mine, other, ended = ends
    other.sendall(b".")
    HostWatch(mine, "host 1 (10.0.0.2)", ended.set, silence=2)
    assert ended.wait(_LONG)
    assert "host 1 (10.0.0.2) has not been heard for 2 s, so this server ends" in caplog.text


class _Clock:
    """Time, sleeping and waiting for a connection as the watch has them: the other host says something
    whenever it is looked at, until `silent`.
    """

    def __init__(self, other: socket.socket, silent: float) -> None:
        self.now = 0.0
        self._other = other
        self._silent = silent

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def select(self, read: list, write: list, error: list, seconds: float) -> tuple[list, list, list]:
        if self.now < self._silent:
            self._other.sendall(b".")
        ready = select.select(read, write, error, 0)
        self.now += 0 if ready[0] else seconds
        return ready


def test_an_end_that_is_heard_goes_on_and_silence_counts_from_the_last_sign(ends, monkeypatch):
    mine, other, ended = ends
    clock = _Clock(other, silent=60)
    monkeypatch.setattr(host_watch, "time", clock)
    monkeypatch.setattr(host_watch, "select", clock)
    ended_at = []

    def end() -> None:
        ended_at.append(clock.now)
        ended.set()

    HostWatch(mine, "host 1", end, silence=8)
    assert ended.wait(_LONG)
    assert 60 + 8 - 2 <= ended_at[0] <= 60 + 8 + 2


def _met(introductions: list[bytes], monkeypatch) -> list[str]:
    """The names of the hosts that are watched after these said who they are."""
    watched: list[str] = []
    monkeypatch.setattr(host_watch, "HostWatch", lambda _connection, name, _end: watched.append(name))
    listener = host_watch._listen("127.0.0.1")
    connections = []
    for said in introductions:
        connection = socket.create_connection(listener.getsockname())
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        connections.append(connection)
    host_watch._accept(listener, TOKEN, 2, lambda: None)
    for connection in connections:
        connection.close()
    return watched


def test_who_does_not_know_the_token_or_was_there_before_is_turned_away(monkeypatch):
    wrong = b"x" * len(TOKEN)
    said = [wrong + b"\0\1", TOKEN + b"\0\1", TOKEN + b"\0\1", TOKEN[:5], TOKEN + b"\0\2"]
    assert _met(said, monkeypatch) == ["host 1 (127.0.0.1)", "host 2 (127.0.0.1)"]


def test_the_own_address_is_the_one_on_the_way_to_the_other():
    assert own_address("127.0.0.1") == "127.0.0.1"


@pytest.fixture
def name_of_loopback(monkeypatch):
    """ "myhost" stands for 127.0.1.1 on this host, as Debian's installer writes it."""
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    for name in ("SGLANG_HOST_IP", "HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    return "myhost"


def test_a_loopback_address_is_not_told_to_other_hosts(name_of_loopback, caplog):
    host_address.choose(SimpleNamespace(nnodes=2, dist_init_addr=f"{name_of_loopback}:5000"))
    assert "SGLANG_HOST_IP" not in os.environ
    assert "myhost is 127" in caplog.text


def test_other_hosts_reach_one_whose_name_is_a_loopback_address_to_itself(name_of_loopback):
    with host_watch._listen(name_of_loopback) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_an_address_between_the_hosts_is_listened_behind():
    with host_watch._listen("192.0.2.1") as listener:  # of no machine (RFC 5737)
        assert listener.getsockname()[0] == "0.0.0.0"


def test_the_launching_process_is_told_and_never_whoever_came_in_its_place(monkeypatch):
    """A process whose parent has ended is given to another one, such as that with the id 1."""
    sent, parent = [], [4711]
    monkeypatch.setattr(host_watch.os, "getppid", lambda: parent[0])
    monkeypatch.setattr(host_watch.os, "kill", lambda *call: sent.append(call))
    end = host_watch.ending_of_server()
    end()
    assert sent == [(4711, signal.SIGQUIT)]
    parent[0] = 1
    end()
    assert sent[1:] == [(os.getpid(), signal.SIGKILL)]
