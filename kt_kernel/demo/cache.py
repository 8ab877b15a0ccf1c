"""The demo checkpoint in the user's cache: built once, whole or not at all.

A builder holds an exclusive lock, writes into a temporary directory beside the final one, records
the size of every file, and renames.  Whoever finds the final directory with all recorded files uses
it without taking the lock; a directory with a missing or cut file is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kt_kernel.demo.gguf_source import DemoError, SourceFile, SourceModel, find_source
from kt_kernel.user_cache import cache_root

log = logging.getLogger(__name__)

LAYOUT_VERSION = 3  # raise whenever the files written by checkpoint.py change
_MANIFEST = "kt_demo_files.json"
_SPARE_BYTES = 32 << 20  # tokenizer, configuration and the file system's own needs


def demo_checkpoint_path(source: SourceFile) -> Path:
    """Where the checkpoint made from `source` lives, built or not."""
    return cache_root() / f"demo-smollm2-135m-8x192-{source.package_version}-v{LAYOUT_VERSION}"


def ensure_demo_checkpoint() -> Path:
    """The directory of the complete demo checkpoint, building it (about 330 MB) if need be.

    Raises:
        DemoError: the source package is missing, or the cache cannot hold the checkpoint.
    """
    source = find_source()
    target = demo_checkpoint_path(source)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_suffix(target.suffix + ".lock")):
            if not _is_complete(target):  # another builder may have finished while we waited
                _build(source, target)
    except OSError as error:
        raise DemoError(
            f"The demo model cannot be written below {target.parent} ({error}): make it writable, "
            "or set XDG_CACHE_HOME to a directory with 400 MB of free space."
        ) from error
    return target


def _build(source: SourceFile, target: Path) -> None:
    from kt_kernel.demo.checkpoint import checkpoint_bytes, write_checkpoint

    model = SourceModel(source.path)
    needed = checkpoint_bytes(model.dimensions) + _SPARE_BYTES
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise DemoError(
            f"The demo model needs {needed >> 20} MiB in {target.parent}, {free >> 20} MiB are free: "
            "free some, or set XDG_CACHE_HOME to another disk."
        )
    log.info("building the demo model (%d MiB) in %s", needed >> 20, target)
    started = time.monotonic()
    temporary_prefix = f".{target.name}."
    for abandoned in target.parent.glob(temporary_prefix + "*"):  # left by a builder that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=temporary_prefix, dir=target.parent))
    try:
        write_checkpoint(model, work)
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
    log.info("demo model built in %.1f s", time.monotonic() - started)


def _is_complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / _MANIFEST).read_text())
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    with lock_file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is building the demo model, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
