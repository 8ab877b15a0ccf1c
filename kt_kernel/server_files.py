"""What the processes of a server keep outside their memory, under names that say whose it is.

A server that is killed removes nothing, nor do Python's helpers, which are killed with it. So each has a
folder of its own, locked while its first process lives, whose name is a part of all other names:

    $TMPDIR/kt-server-XXXXXXXX/           sockets between its processes, and their other temporary files
    /dev/shm/sem.kt-server-XXXXXXXX-...   semaphores
    /dev/shm/kt-server-XXXXXXXX-...       shared memory

A folder that nobody holds locked belongs to a dead server: whoever starts the next one removes it, and all
that has its name.  A lock, and not the number of a process, because containers share folders but not
numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import multiprocessing
import os
import re
import shutil
import stat
import tempfile
from multiprocessing import shared_memory
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "kt-server-"
# The folder of the server that a process belongs to; its children inherit it.
VARIABLE = "KT_SERVER_FILES"
SHARED_MEMORY = Path("/dev/shm")
_LOCK = ".kt-server-lock"
_OURS = re.compile(PREFIX + "[a-z0-9_]{8}")  # as `mkdtemp` makes names
_RANDOM_DIGITS = 8  # of the name of shared memory
# Addresses of Unix sockets have at most 107 bytes; the longest name in the folder has this many.
_LONGEST_FOLDER = 107 - len("/tmpxxxxxxxx")


def begin() -> Path | None:
    """Sweep, then give this process and those that it starts a folder of their own; None where none can be
    made.

    Temporary files, semaphores and shared memory have its name from now on.
    """
    sweep()
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_usual_folder()))
        if len(str(folder)) > _LONGEST_FOLDER:
            folder.rmdir()
            return None
        _lock(folder)
    except OSError as error:
        logger.warning("files of this server stay behind if it is killed: no folder for them (%s)", error)
        return None
    # Caches that a later start is to find again.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.parent / f"torchinductor_{os.getuid()}"))
    os.environ[VARIABLE] = os.environ["TMPDIR"] = str(folder)
    use_names()
    return folder


def use_names() -> None:
    """In each process of a server: names of the server's, for what is made from now on."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    name = Path(folder).name
    tempfile.tempdir = folder
    # Python has no other way to say it. Children get the first one from their parent.
    configuration: dict[str, object] = vars(multiprocessing.current_process())["_config"]
    configuration["semprefix"] = f"/{name}"
    names = vars(shared_memory)
    names["_SHM_NAME_PREFIX"] = f"/{name}-"
    names["_SHM_SAFE_NAME_LENGTH"] = len(f"/{name}-") + _RANDOM_DIGITS


def own_name(path: str) -> str:
    """`path` in shared memory, under this server's name; as it is where there is none."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return path
    return str(Path(path).with_name(f"{Path(folder).name}-{Path(path).name}"))


def sweep() -> list[str]:
    """Remove what servers left that do not run any more; returns the names of their folders."""
    dead = []
    for folder in Path(_usual_folder()).glob(f"{PREFIX}*"):
        lock = _lock_if_dead(folder)
        if lock is not None:
            _remove(folder)
            os.close(lock)
            dead.append(folder.name)
    return dead


def end() -> None:
    """In the process that called `begin`, when the others have ended: remove what is left."""
    for folder in _held:
        _remove(folder)


def _remove(folder: Path) -> None:
    for entry in (*SHARED_MEMORY.glob(f"{folder.name}-*"), *SHARED_MEMORY.glob(f"sem.{folder.name}-*")):
        with contextlib.suppress(OSError):  # somebody else's under the same name
            entry.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _usual_folder() -> str:
    """For temporary files, of a process that may already have a server's."""
    folder = tempfile.gettempdir()
    return os.path.dirname(folder) if os.path.basename(folder).startswith(PREFIX) else folder


_held: dict[Path, int] = {}  # their locks, until this process ends


def _lock(folder: Path) -> None:
    """The lock gets its name when it is held: another start that sweeps never sees it free."""
    unnamed = folder / f"{_LOCK}.new"
    descriptor = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unnamed.rename(folder / _LOCK)
    _held[folder] = descriptor


def _lock_if_dead(folder: Path) -> int | None:
    """Its lock, taken, if it is a folder of ours that no process holds.

    One without a lock is being made at this moment; what others made is theirs.
    """
    try:
        status = folder.lstat()
        if not _OURS.fullmatch(folder.name) or status.st_uid != os.getuid() or not _is_private(status):
            return None
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_private(status: os.stat_result) -> bool:
    """A folder for its owner alone, as `mkdtemp` makes them."""
    return stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == stat.S_IRWXU
