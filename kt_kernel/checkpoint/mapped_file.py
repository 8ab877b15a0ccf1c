"""A file of weights mapped into memory: tensors are views of the mapping, nothing is copied.

What the files of every container have in common; a subclass reads the header into `tensors`.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from kt_kernel.errors import CheckpointError, CheckpointPathError, MissingTensorError
from kt_kernel.faults import fails

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_POINTER = b"version "  # how the text begins that git-lfs leaves in place of a file


class Extent(Protocol):
    """Where a tensor lies, in bytes from the start of the file."""

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int: ...


class MappedFile:
    """A file held open and mapped read-only until it is collected; `map` is empty for an empty file.

    Raises CheckpointPathError, or CheckpointError if it cannot be read or is no more than a pointer to it.
    """

    tensors: Mapping[str, Extent]

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb", opener=_open_without_waiting) as file:
                _require_plain_file(path, file.fileno())
                if fails("file-read"):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                self.size = os.fstat(file.fileno()).st_size
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except FileNotFoundError:
            raise CheckpointPathError(
                f"file '{path}' does not exist; download the checkpoint again."
            ) from None
        except OSError as error:
            raise CheckpointError(f"file '{path}' cannot be read: {error.strerror or error}.") from error
        if self.map[: len(_POINTER)] == _POINTER:
            raise CheckpointError(
                f"file '{path}' is a git-lfs pointer of {self.size} bytes, not weights; run 'git lfs pull'."
            )
        with warnings.catch_warnings():
            # torch warns that writing to a read-only buffer is undefined; nothing here writes.
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = (
                torch.frombuffer(self.map, dtype=torch.uint8)
                if self.size
                else torch.empty(0, dtype=torch.uint8)
            )

    def extent(self, name: str) -> Extent:
        """Where the tensor lies; raises MissingTensorError."""
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError(f"tensor '{name}' is not in '{self.path}'.") from None

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes as a read-only view of the mapping, uint8 [bytes]."""
        extent = self.extent(name)
        return self.bytes[extent.begin : extent.end]

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to start reading these tensors."""
        self._advise(names, mmap.MADV_WILLNEED)

    def drop_pages(self, names: Iterable[str]) -> None:
        """Give back the memory of these tensors' pages; a later access reads them from the file again."""
        self._advise(names, mmap.MADV_DONTNEED)

    def watch(self) -> Any:
        """Lets reads behind a new end of the file give zeros instead of ending the process, while the result
        lives, whose `cut_off` tells; None for an empty file.
        """
        from kt_kernel import kt_kernel_ext

        return kt_kernel_ext.MappedReads(self.bytes.data_ptr(), self.size) if self.size else None

    def _advise(self, names: Iterable[str], advice: int) -> None:
        for begin, end in _page_ranges((self.extent(name) for name in names), self.size):
            self.map.madvise(advice, begin, end - begin)


class MappedFiles(ABC):
    """Tensors in several files."""

    @abstractmethod
    def file_of(self, name: str) -> MappedFile:
        """The file that holds the tensor; raises MissingTensorError."""

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to start reading these tensors."""
        for file, in_file in self._by_file(names):
            file.will_need(in_file)

    def drop_pages(self, names: Iterable[str]) -> None:
        """Give back the memory of these tensors' pages."""
        for file, in_file in self._by_file(names):
            file.drop_pages(in_file)

    @contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[None]:
        """While all of these tensors are read once: asked for before, their pages given back behind.

        Raises CheckpointError if a file became shorter meanwhile: what was read of it is not the weights.
        """
        files = [file for file, _ in self._by_file(names)]
        watches = [file.watch() for file in files]
        self.will_need(names)
        try:
            yield
        finally:
            self.drop_pages(names)
        for file, watch in zip(files, watches, strict=True):
            if watch is not None and watch.cut_off:
                raise CheckpointError(
                    f"file '{file.path}' was cut off while it was read: it has "
                    f"{os.stat(file.path).st_size} bytes, and had {file.size}; download it again."
                )

    def _by_file(self, names: Iterable[str]) -> list[tuple[MappedFile, list[str]]]:
        by_file = defaultdict(list)
        for name in names:
            by_file[self.file_of(name)].append(name)
        return list(by_file.items())


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe would otherwise wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _require_plain_file(path: str, descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"'{path}' is no plain file but {_KINDS.get(stat.S_IFMT(mode), 'something else')}; give a file "
            "of weights."
        )


def _page_ranges(extents: Iterable[Extent], file_size: int) -> list[tuple[int, int]]:
    """Byte ranges covering the tensors, starting at page borders, neighbours merged."""
    ranges: list[tuple[int, int]] = []
    for extent in sorted(extents, key=lambda extent: extent.begin):
        begin = extent.begin - extent.begin % mmap.PAGESIZE
        end = min(extent.end, file_size)
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        elif end > begin:
            ranges.append((begin, end))
    return ranges
