"""The demo checkpoint in the user's cache: built once, whole or not at all (kt_kernel/user_cache.py)."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from kt_kernel.demo.gguf_source import DemoError, SourceFile, SourceModel, find_source
from kt_kernel.user_cache import cache_root, cached_directory

log = logging.getLogger(__name__)

LAYOUT_VERSION = 3  # raise whenever the files written by checkpoint.py change
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
    try:
        return cached_directory(target, "the demo model", lambda directory: _write(source, target, directory))
    except OSError as error:
        raise DemoError(
            f"The demo model cannot be written below {target.parent} ({error}): make it writable, "
            "or set XDG_CACHE_HOME to a directory with 400 MB of free space."
        ) from error


def _write(source: SourceFile, target: Path, directory: Path) -> None:
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
    write_checkpoint(model, directory)
    log.info("demo model built in %.1f s", time.monotonic() - started)
