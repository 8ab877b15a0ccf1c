"""A server's processes by name, what they listen on, and what is left when one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import requests
from server import Server

from kt_kernel import server_files

PATIENCE_SECONDS = 60  # 1 to 3 s on a free core; reached only when something hangs
ANSWER_TOKENS = 1500  # far from done when the process ends, and within every context here
LISTENING = "0A"  # a socket's state in /proc/net/tcp


def process_named(server: Server, title: str) -> int:
    """The id of SGLang's process `title`, such as "scheduler" or "detokenizer"."""
    (found,) = [
        process
        for process in server.processes()
        if f"sglang::{title}" in Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    ]
    return found


def addresses_listened_on(server: Server) -> set[str]:
    """Of TCP sockets of all processes."""
    inodes = {
        target[len("socket:[") : -1]
        for process in server.processes()
        for target in _descriptors(process)
        if target.startswith("socket:[")
    }
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and inode in inodes:
                found.add(_address(family, local.partition(":")[0]))
    return found


def _descriptors(process: int) -> list[str]:
    targets = []
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                targets.append(os.readlink(descriptor))
    return targets


def _address(family: int, digits: str) -> str:
    """The kernel prints words of the machine's byte order."""
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


def kill_and_check(server: Server, process: int, sentence: str) -> None:
    """Kill one process of a server that is answering: the client is told, all end, and nothing stays."""
    end_and_check(server, lambda: os.kill(process, signal.SIGKILL), sentence)


def end_and_check(server: Server, end: Callable[[], None], *sentences: str) -> None:
    """The same where `end()` lets one of its processes end; the log has at least one of `sentences`."""
    name = server_name(server)
    assert left_of(name)
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    body = {"text": "The keeper", "sampling_params": sampling, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=PATIENCE_SECONDS) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert b'"error"' not in first, first
        end()
        with contextlib.suppress(requests.RequestException):  # cut off, or an error as the last event
            assert all(
                "finish_reason" not in json.loads(line[6:]) for line in lines if line.startswith(b"data: {")
            )
    server.wait_until_gone(PATIENCE_SECONDS)
    assert not server.is_listening()
    assert any(sentence in server.log_text() for sentence in sentences), server.log_tail()
    server_files.sweep()
    assert not left_of(name)


def server_name(server: Server) -> str:
    """Which all of its files have (kt_kernel/server_files.py)."""
    environment = Path(f"/proc/{process_named(server, 'detokenizer')}/environ").read_bytes().split(b"\0")
    variable = f"{server_files.VARIABLE}=".encode()
    (folder,) = [entry.removeprefix(variable).decode() for entry in environment if entry.startswith(variable)]
    return Path(folder).name


def left_of(name: str) -> list[Path]:
    """What bears a server's name in the places that servers share."""
    folders = (Path(tempfile.gettempdir()), server_files.SHARED_MEMORY)
    return [entry for folder in folders for entry in folder.iterdir() if name in entry.name]
