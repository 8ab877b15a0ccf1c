"""Reading a header from front to back, never behind the end of the file, whatever it promises."""

from __future__ import annotations

import mmap
import struct

from kt_kernel.errors import CheckpointError

# The specification's bound on keys; no tensor has a longer name either.
LONGEST_NAME = 65535

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Cursor:
    """A place in a file. Each method raises CheckpointError if the file ends before what it reads."""

    def __init__(self, path: str, data: mmap.mmap | bytes, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.skip(8, what))[0]

    def skip(self, count: int, what: str) -> int:
        """Step over so many bytes; returns where they begin."""
        begin = self.at
        if count > self.size - begin:
            raise self._cut_off(begin + count, what)
        self.at = begin + count
        return begin

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """So many entries, of at least so many bytes each, must fit into the rest of the file."""
        if count * least_bytes > self.size - self.at:
            raise damaged(
                self.path,
                f"it promises {count} {what}, which cannot fit into the {self.size - self.at} bytes behind "
                f"byte {self.at}",
            )

    def name(self, what: str) -> str:
        """A printable string of 1 to `LONGEST_NAME` bytes."""
        length = self.u64(what)
        if not 1 <= length <= LONGEST_NAME:
            raise damaged(
                self.path, f"{what} at byte {self.at} has {length} bytes, expected 1 to {LONGEST_NAME}"
            )
        begin = self.skip(length, what)
        name = decode(self.path, self.data[begin : self.at], what)
        if not name.isprintable():  # messages with it would not be one line
            raise damaged(self.path, f"{what} is {name[:80]!r}, expected printable characters")
        return name

    def skip_strings(self, count: int, what: str) -> None:
        """Step over an array of strings, which are not looked at."""
        self.check_count(count, 8, f"strings in {what}")
        length_at, data, at, last = _U64.unpack_from, self.data, self.at, self.size - 8
        for _ in range(count):
            if at > last:
                raise self._cut_off(at + 8, what)
            at += 8 + length_at(data, at)[0]
        if at > self.size:
            raise self._cut_off(at, what)
        self.at = at

    def _cut_off(self, end: int, what: str) -> CheckpointError:
        return damaged(self.path, f"{what} would end at byte {end} and the file has {self.size} bytes")


def decode(path: str, text: bytes, what: str) -> str:
    """The string that these bytes are; raises CheckpointError if they are not UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = text[max(0, error.start - 4) : error.start + 4]
        raise damaged(path, f"{what} is not UTF-8 at its byte {error.start} ({shown!r})") from None


def damaged(path: str, seen: str) -> CheckpointError:
    """The error for a file that was cut off or overwritten."""
    return CheckpointError(f"file '{path}' is cut off or damaged: {seen}; download it again.")
