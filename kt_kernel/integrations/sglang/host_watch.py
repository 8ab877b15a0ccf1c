"""Servers on several hosts (--nnodes): when one host is gone, the others end, and say so.

SGLang's ranks wait for each other without a limit of time: a host whose process was killed closes its
connections, and the sums over the ranks fail, but one that lost its power or its network leaves the others
waiting. So the first rank of each host keeps a connection to the first host's, on which both send a byte
every second.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from kt_kernel.integrations.sglang.host_address import host_of, is_loopback
from kt_kernel.integrations.sglang.rank_cores import RanksHere

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 1.0
# A host that swaps, or whose clock stands still while it is migrated, is silent for some seconds.
_SECONDS_OF_SILENCE = 15.0
# A server that is stopped in order ends all its hosts by itself.
_SECONDS_TO_END = 5.0
_TOKEN_BYTES = 16

# What to do when another host is gone.
Ending = Callable[[], None]


class HostWatch:
    """One end of a connection to another host, `name`, watched by a thread that ends with the process."""

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        end: Ending,
        *,
        silence: float = _SECONDS_OF_SILENCE,
        to_end: float = _SECONDS_TO_END,
    ) -> None:
        self._connection = connection
        self._name = name
        self._end = end
        self._silence = silence
        self._to_end = to_end
        connection.settimeout(0)
        threading.Thread(target=self._run, name="kt-host-watch", daemon=True).start()

    def _run(self) -> None:
        heard = time.monotonic()
        while time.monotonic() - heard < self._silence:
            try:
                self._connection.send(b".")
            except BlockingIOError:
                pass  # it does not read; the silence will tell
            except OSError:
                return self._closed()
            if select.select([self._connection], [], [], _SECONDS_BETWEEN)[0]:
                if not self._received():
                    return self._closed()
                heard = time.monotonic()
                time.sleep(_SECONDS_BETWEEN)
        logger.error(
            "%s has not been heard for %.0f s, so this server ends: start both again, once the network or "
            "the host is back",
            self._name,
            self._silence,
        )
        self._end()

    def _received(self) -> bool:
        try:
            return bool(self._connection.recv(4096))
        except OSError:
            return False

    def _closed(self) -> None:
        logger.error("%s has ended, so this server ends, too: its log says why", self._name)
        time.sleep(self._to_end)
        self._end()


def begin(runner: Any, *_: Any, **__: Any) -> None:
    """Before `ModelRunner.load_model`; collective, once in each process."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.nnodes == 1 or runner.is_draft_worker:
        return
    group = parallel.world_group
    first_of_host = RanksHere.of(parallel).index == 0
    address = host_of(parallel.dist_init_addr)
    listener = _listen(address) if group.rank_in_group == 0 else None
    offer = None if listener is None else (listener.getsockname()[1], secrets.token_bytes(_TOKEN_BYTES))
    port, token = group.broadcast_object(offer, src=0)
    if listener is not None:
        _accept(listener, token, parallel.nnodes - 1, ending_of_server())
    elif first_of_host:
        connection = socket.create_connection((address, port), timeout=_SECONDS_OF_SILENCE)
        connection.sendall(token + parallel.node_rank.to_bytes(2, "big"))
        HostWatch(connection, f"host 0 ({address})", ending_of_server())


def _listen(address: str) -> socket.socket:
    """On the address that the other hosts know this one by; on all, where that is a name that stands for a
    loopback address here, or belongs to what stands between the hosts. Who connects must know the token.
    """
    family, *_, (found, *_) = socket.getaddrinfo(address, None)[0]
    if not ipaddress.ip_address(found).is_loopback or is_loopback(address):
        with contextlib.suppress(OSError):
            return socket.create_server((found, 0), family=family)
    return socket.create_server(("", 0), family=family)


def _accept(listener: socket.socket, token: bytes, hosts: int, end: Ending) -> None:
    """Watch that many hosts, which know the token; others are turned away."""
    listener.settimeout(_SECONDS_OF_SILENCE)
    met: set[int] = set()
    with listener:
        while len(met) < hosts:
            connection, (address, *_) = listener.accept()
            connection.settimeout(_SECONDS_BETWEEN)
            number = _introduced(connection, token)
            if number is None or number in met:
                connection.close()
                continue
            met.add(number)
            HostWatch(connection, f"host {number} ({address})", end)


def _introduced(connection: socket.socket, token: bytes) -> int | None:
    """The number of the host that knows the token."""
    said = b""
    try:
        while len(said) < len(token) + 2 and (more := connection.recv(64)):
            said += more
    except OSError:
        return None
    known = secrets.compare_digest(said[: len(token)], token)
    return int.from_bytes(said[len(token) : len(token) + 2], "big") if known else None


def ending_of_server() -> Ending:
    """As a scheduler of SGLang ends its server: the launching process, whose child this process must be now,
    ends all of its children. Where that is gone by then, this process ends alone.
    """
    launcher = os.getppid()

    def end() -> None:
        if os.getppid() == launcher:
            os.kill(launcher, signal.SIGQUIT)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    return end
