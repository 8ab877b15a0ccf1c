"""Where this package keeps what it can make again: `$XDG_CACHE_HOME/kt-kernel`, else below `~/.cache`.

A directory there is whole or absent: a builder holds an exclusive lock, writes into a temporary directory
beside the final one, records the size of every file, and renames. Whoever finds the final directory with all
recorded files uses it without taking the lock; one with a missing or cut file is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MANIFEST = "kt_files.json"


def cache_root() -> Path:
    """The directory, whether it exists or not."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kt-kernel"


def file_of_key(folder: str, key: Mapping[str, str | int]) -> Path:
    """Where in `folder` of the cache the file for `key` is, whether it exists or not."""
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    return cache_root() / folder / f"{name}.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, with the folders above it. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        json.dump(content, part, indent=1)
    os.replace(part.name, path)


def cached_directory(target: Path, what: str, write: Callable[[Path], None]) -> Path:
    """`target`, complete: what `write` puts into an empty directory, unless an earlier call has done so.

    `what` it is, for the log. Raises OSError if the cache cannot be written, and what `write` raises; nothing
    is left behind then.
    """
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.with_suffix(target.suffix + ".lock"), what):
        if not _is_complete(target):  # another builder may have finished while we waited
            _build(target, write)
    return target


def _build(target: Path, write: Callable[[Path], None]) -> None:
    temporary_prefix = f".{target.name}."
    for abandoned in target.parent.glob(temporary_prefix + "*"):  # left by a builder that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=temporary_prefix, dir=target.parent))
    try:
        write(work)
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        (work / _MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n")
        work.chmod(0o755)  # mkdtemp and safetensors make files private; a public model is no secret
        for path in work.iterdir():
            path.chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _is_complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / _MANIFEST).read_text())
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _exclusive(lock_file: Path, what: str) -> Iterator[None]:
    with lock_file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is building %s, waiting for it", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
