"""Risk: servers that were killed fill /tmp and /dev/shm, or what removes their files takes a living
server's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kt_kernel import server_files

SERVER = """
import multiprocessing, tempfile, time
from multiprocessing import shared_memory
from pathlib import Path
from kt_kernel import server_files
folder = server_files.begin()
lock = multiprocessing.get_context("spawn").Lock()
memory = shared_memory.SharedMemory(create=True, size=64)
socket = tempfile.NamedTemporaryFile(delete=False)
loads = Path(server_files.own_name("/dev/shm/loads"))
loads.write_text("")
print(folder.name, memory.name, socket.name, loads, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A process that has what a server has, and what it prints; killed with all that it started."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process, process.stdout.readline().split()
    _kill(process)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _named(name: str) -> list[str]:
    folders = (Path(tempfile.gettempdir()), server_files.SHARED_MEMORY)
    return sorted(entry.name for folder in folders for entry in folder.iterdir() if name in entry.name)


def test_what_a_killed_server_leaves_is_removed_by_the_next(server):
    process, (name, memory, socket, loads) = server
    assert name.startswith(server_files.PREFIX)
    assert Path(socket).parent.name == name
    assert {memory.lstrip("/"), Path(loads).name} <= set(_named(name))
    assert any(entry.startswith(f"sem.{name}") for entry in _named(name))
    before = _named(name)
    assert server_files.sweep() == []
    assert _named(name) == before, "it lives"
    _kill(process)
    assert _named(name) == before
    assert server_files.sweep() == [name]
    assert _named(name) == []


def test_what_has_no_lock_is_not_ours_to_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{server_files.PREFIX}abcdefgh").mkdir(mode=0o700)  # being made
    (tmp_path / f"{server_files.PREFIX}a-link").symlink_to(tmp_path)
    (tmp_path / f"{server_files.PREFIX}a-file").write_text("")
    assert server_files.sweep() == []
    assert len(list(tmp_path.iterdir())) == 3


def _dead(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    (folder / ".kt-server-lock").touch()
    return folder


def test_folders_of_others_that_are_named_alike_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = [
        _dead(tmp_path / f"{server_files.PREFIX}logs"),
        _dead(tmp_path / f"{server_files.PREFIX}public_1"),
    ]
    kept[1].chmod(0o755)
    mine = _dead(tmp_path / f"{server_files.PREFIX}private1")
    assert server_files.sweep() == [mine.name]
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_what_cannot_be_removed_keeps_no_server_from_starting(tmp_path, monkeypatch):
    """Somebody else's file in shared memory, under the name of a dead server."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server_files, "SHARED_MEMORY", tmp_path / "shared")
    dead = _dead(tmp_path / f"{server_files.PREFIX}aaaaaaaa")
    stubborn = tmp_path / "shared" / f"{dead.name}-folder"  # `unlink` refuses it
    stubborn.mkdir(parents=True)
    assert server_files.sweep() == [dead.name]
    assert stubborn.exists() and not dead.exists()
