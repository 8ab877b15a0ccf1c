"""One shard on disk: written under a temporary name, made durable, renamed.

So a file with the final name is whole.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from kt_kernel.convert.layout import ShardLayout
from kt_kernel.errors import ConversionError

_UNFINISHED = ".partial"


def unfinished_name(path: Path) -> Path:
    """The temporary name beside `path`; readers of checkpoints do not look at it."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


def remove_unfinished(directory: Path) -> None:
    """What an interrupted conversion left behind."""
    for path in directory.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


class ShardWriter:
    """Writes the tensors of a layout, from any thread and in any order."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self._path, self._layout = path, layout
        self._file = os.open(unfinished_name(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._write(memoryview(layout.header), 0)

    def write(self, tensor_name: str, tensor: torch.Tensor) -> None:
        """The bytes of a contiguous tensor, to their place. Raises ConversionError."""
        octets = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        self._write(octets, self._layout.places[tensor_name])

    def finish(self, source_hash: str) -> None:
        """Everything was written: give the file its name. Raises ConversionError."""
        self._write(memoryview(source_hash.encode()), self._layout.hash_at)
        size = os.fstat(self._file).st_size
        assert size == self._layout.file_bytes, f"{self._path} has {size} bytes"
        try:
            os.fsync(self._file)
            os.close(self._file)
            os.rename(unfinished_name(self._path), self._path)
            fsync_directory(self._path.parent)
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        """Give up; the unfinished file stays behind."""
        os.close(self._file)

    def _write(self, octets: memoryview, place: int) -> None:
        try:
            while octets:
                written = os.pwrite(self._file, octets, place)
                octets, place = octets[written:], place + written
        except OSError as error:
            raise write_error(self._path, error) from error


def finished_hash(path: Path, layout: ShardLayout) -> str:
    """The source hash of a finished shard that should have this layout.

    Raises ConversionError for a file that was made from other weights, or has been damaged since.
    """
    try:
        with path.open("rb") as file:
            header = file.read(len(layout.header))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConversionError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not layout.is_header_of(header):
        raise ConversionError(
            f"'{path}' was made from other weights or in another way than this conversion would make it; "
            "choose an empty output folder."
        )
    if size != layout.file_bytes:
        raise ConversionError(
            f"'{path}' has {size} bytes, expected {layout.file_bytes}; delete that file and run the command "
            "again."
        )
    return layout.hash_in(header)


def write_small(path: Path, content: bytes) -> None:
    """A small file, whole or not at all; left alone if it is there already. Raises ConversionError."""
    try:
        if path.exists() and path.read_bytes() == content:
            return
        with unfinished_name(path).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished_name(path), path)
        fsync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, where its file system knows how."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(directory)


def write_error(path: Path, error: OSError) -> ConversionError:
    return ConversionError(
        f"'{path}' cannot be written: {error.strerror}; finished layers are kept, run the same command again "
        "when that is mended."
    )
