"""The processes of one host that train one model: the first one packs the experts, the others attach.

    first   listens --- accepts the others --- gives out cores ---- per layer: loads, sends (file, contents)
    other   connects -- says what it loads ---- is given cores ---- per layer: receives, maps the file

The file is memory without a name (memfd), passed through a socket without one in the file system: both are
gone with the last process, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.stored import StoredExperts
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.threads import cores_of_processes

PATIENCE = 600.0  # seconds until all processes are here; from network disks, imports alone can take minutes
_RETRY = 0.05  # seconds
_LENGTH = struct.Struct("!I")
_PEER = struct.Struct("3i")  # SO_PEERCRED: process, user, group
_LOADS = count()  # of this process: every process of a host loads the same models in the same order


@dataclass(frozen=True)
class Place:
    """Which of the host's processes this is; `run` names what they load together, and nothing else."""

    index: int = 0
    count: int = 1
    run: str = ""

    @classmethod
    def of_environment(cls) -> Place:
        """What torchrun and accelerate launch say; alone where they say nothing. For one loading."""
        values = [os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        if not all(value.isdecimal() for value in values):
            return cls()
        said = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        run = "-".join(os.environ.get(name, "") for name in said)
        run = f"{os.getuid()}-{run}-{next(_LOADS)}"
        # The names of hosts and runs may be longer than that of a socket, 107 bytes.
        return cls(int(values[0]), int(values[1]), hashlib.sha256(run.encode()).hexdigest())


class Host(Protocol):
    """The processes of this host. `cores`: those of this one; None: whatever it may use."""

    cores: list[int] | None

    def layer(self, load: Callable[[], KTMoEWrapper], empty: Callable[[], KTMoEWrapper]) -> KTMoEWrapper:
        """The next layer's experts: `load` packs them, `empty` is the same without weights."""


class Alone:
    """One process."""

    cores: list[int] | None = None

    def layer(self, load: Callable[[], KTMoEWrapper], empty: Callable[[], KTMoEWrapper]) -> KTMoEWrapper:
        return load()


class First:
    """The process that packs."""

    def __init__(self, peers: Sequence[_Peer], cores: list[int] | None) -> None:
        self._peers, self.cores = peers, cores

    def layer(self, load: Callable[[], KTMoEWrapper], empty: Callable[[], KTMoEWrapper]) -> KTMoEWrapper:
        wrapper = load()
        file = os.memfd_create("kt_trained_experts")
        try:
            stored = wrapper.share_weights(file)
            for peer in self._peers:
                peer.send({"layer": wrapper.layer_idx, **_pools(wrapper), **stored.fields()}, file)
        finally:
            os.close(file)
        return wrapper


class Other:
    """A process that attaches."""

    def __init__(self, first: _Peer, cores: list[int] | None) -> None:
        self._first, self.cores = first, cores

    def layer(self, load: Callable[[], KTMoEWrapper], empty: Callable[[], KTMoEWrapper]) -> KTMoEWrapper:
        message, file = self._first.receive()
        if file < 0:
            raise ConfigurationError(
                "no open file came from the first process of this host; raise the limit (ulimit -n)."
            )
        try:
            wrapper = empty()
            ours = {"layer": wrapper.layer_idx, **_pools(wrapper)}
            theirs = {name: message.pop(name) for name in ours}
            if ours != theirs:
                raise ConfigurationError(
                    f"this process has {ours}, and the first one of this host {theirs}; give all of them the "
                    "same model, threads and pools."
                )
            wrapper.attach_weights(file, StoredExperts.read(message))
        finally:
            os.close(file)
        return wrapper


def meet(place: Place, what: dict[str, Any]) -> Host:
    """Wait for all processes of `place`; `what` describes the model, and is the same in all of them.

    Raises ConfigurationError if it is not, or they do not come.
    """
    if place.count == 1:
        return Alone()
    name = f"\0kt-training-{place.run}"
    mine = {"what": what, "cpus": sorted(os.sched_getaffinity(0)), "index": place.index}
    try:
        return _first(name, place, mine) if place.index == 0 else _other(name, place, mine)
    except TimeoutError:
        raise ConfigurationError(
            f"only some of the {place.count} processes of this host have loaded the model after "
            f"{PATIENCE:.0f} s; load it in each of them."
        ) from None


def _first(name: str, place: Place, mine: dict[str, Any]) -> First:
    peers, said = [], [mine]
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(name)
        except OSError as error:
            raise ConfigurationError(
                f"another process says that it is the first of this host and run ({error.strerror}); give "
                "each a LOCAL_RANK of its own."
            ) from None
        listener.listen(place.count)
        while len(said) < place.count:
            listener.settimeout(max(deadline - time.monotonic(), _RETRY))
            peer = _Peer(listener.accept()[0])
            if peer.is_own_user():
                peers.append(peer)
                said.append(peer.receive_by(deadline))
    indices = sorted(each["index"] for each in said)
    if indices != list(range(place.count)):
        for peer in peers:
            peer.close()
        raise ConfigurationError(
            f"the processes of this host have the LOCAL_RANKs {indices}; number them from 0."
        )
    shares: list[list[int] | None] = [None] * place.count
    if all(each["cpus"] == mine["cpus"] for each in said):  # else whoever started them has bound them
        shares = list(cores_of_processes(kt_kernel_ext.topology(), place.count))
    for peer, each in zip(peers, said[1:], strict=True):
        peer.send({"what": mine["what"], "cores": shares[each["index"]]})
    return First(peers, shares[0])


def _other(name: str, place: Place, mine: dict[str, Any]) -> Other:
    deadline = time.monotonic() + PATIENCE
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            connection.connect(name)
            break
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(_RETRY)
    first = _Peer(connection)
    if not first.is_own_user():
        raise ConfigurationError("the first process of this host belongs to another user; start them as one.")
    first.send(mine)
    answer, _ = first.receive()
    if answer["what"] != mine["what"]:
        raise ConfigurationError(
            f"this process loads {mine['what']}, and the first one of this host {answer['what']}; load the "
            "same in all of them."
        )
    return Other(first, answer["cores"])


class _Peer:
    """Messages, each a length, JSON, and perhaps an open file, over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(None)

    def close(self) -> None:
        """The other side is told that this one ended."""
        self._connection.close()

    def receive_by(self, deadline: float) -> dict[str, Any]:
        """A message without a file; raises TimeoutError."""
        self._connection.settimeout(max(deadline - time.monotonic(), _RETRY))
        message, _ = self.receive()
        self._connection.settimeout(None)
        return message

    def is_own_user(self) -> bool:
        found = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        return _PEER.unpack(found)[1] == os.getuid()

    def send(self, message: dict[str, Any], file: int | None = None) -> None:
        text = json.dumps(message).encode()
        try:
            socket.send_fds(self._connection, [_LENGTH.pack(len(text))], [] if file is None else [file])
            self._connection.sendall(text)
        except (BrokenPipeError, ConnectionResetError):
            raise _ended() from None

    def receive(self) -> tuple[dict[str, Any], int]:
        """The message and its file, -1 for none."""
        try:
            header, files, _, _ = socket.recv_fds(self._connection, _LENGTH.size, 1)
            text = self._exactly(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else b""
        except ConnectionResetError:
            raise _ended() from None
        if not text:
            raise _ended()
        return json.loads(text), files[0] if files else -1

    def _exactly(self, length: int) -> bytes:
        parts = []
        while length and (part := self._connection.recv(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts) if not length else b""


def _ended() -> ConfigurationError:
    return ConfigurationError(
        "another process of this host ended while the model was loaded; its own message says why."
    )


def _pools(wrapper: KTMoEWrapper) -> dict[str, Any]:
    """What decides which panel of an expert is where; with one pool, its threads do not."""
    pools = wrapper.cpu_infer.threads_per_subpool
    return {"method": wrapper.method, "threads of pools": pools if len(pools) > 1 else None}
