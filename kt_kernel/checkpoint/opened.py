"""Readers of checkpoints, opened once and shared by all layers, and replaced when their files change."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Reader = TypeVar("Reader")

# A process serves one model, or one and its draft; more open readers would only hold file handles.
_READERS_KEPT = 2


class OpenReaders(Generic[Reader]):
    """`make` opens the reader of an existing path; `endings` are those of the files that it reads in a
    directory.
    """

    def __init__(self, make: Callable[[str], Reader], endings: tuple[str, ...]) -> None:
        self._make = make
        self._endings = endings
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, tuple[tuple, Reader]] = OrderedDict()

    def open(self, path: str) -> Reader:
        """The reader of `path`, made on first use and again only if its files changed."""
        with self._lock:
            state = self._state_of_files(path)
            known = self._readers.get(path)
            if known is None or known[0] != state:
                known = (state, self._make(path))
                self._readers[path] = known
            self._readers.move_to_end(path)
            while len(self._readers) > _READERS_KEPT:
                self._readers.popitem(last=False)
            return known[1]

    def clear(self) -> None:
        """Close all readers; views still in use keep their own file open."""
        with self._lock:
            self._readers.clear()

    def _state_of_files(self, path: str) -> tuple:
        """Names, sizes and times of the files that make up the checkpoint."""
        directory, own = (path, ()) if os.path.isdir(path) else os.path.split(path)
        endings = (*self._endings, own) if own else self._endings
        state = []
        for entry in os.scandir(directory):
            if entry.name.endswith(endings) and os.path.exists(entry.path):
                status = entry.stat()
                state.append((entry.name, status.st_size, status.st_mtime_ns))
        return tuple(sorted(state))
