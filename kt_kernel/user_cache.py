"""Where this package keeps what it can make again: `$XDG_CACHE_HOME/kt-kernel`, else below `~/.cache`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The directory, whether it exists or not."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kt-kernel"
