"""The metadata of a GGUF file: found when the file is opened, decoded when asked for.

A vocabulary is an array of hundreds of thousands of strings: opening a file steps over it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kt_kernel.errors import CheckpointError
from kt_kernel.gguf.cursor import Cursor, damaged, decode

# number in the file -> struct's letter
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    0: "uint8",
    1: "int8",
    2: "uint16",
    3: "int16",
    4: "uint32",
    5: "int32",
    6: "float32",
    7: "bool",
    8: "string",
    10: "uint64",
    11: "int64",
    12: "float64",
}
_LEAST_ENTRY = 8 + 1 + 4 + 1  # length of the key, key, type, value

_U64 = struct.Struct("<Q")


class GgufArray(Sequence):
    """An array of the metadata, decoded element by element; `tolist()` makes a list of it.

    Raises CheckpointError for a string that is not UTF-8.
    """

    def __init__(self, cursor: Cursor, key: str, kind: int, begin: int, count: int) -> None:
        self.kind = _NAMES[kind]
        self._path, self._data, self._key = cursor.path, cursor.data, key
        self._begin, self._end, self._count = begin, cursor.at, count
        self._letter = _SCALARS.get(kind)
        self._offsets: array | None = None  # of strings, made for access by index

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"index {index} of an array of {self._count}")
        index %= self._count
        if self._letter:
            return struct.unpack_from(
                "<" + self._letter, self._data, self._begin + index * struct.calcsize("<" + self._letter)
            )[0]
        if self._offsets is None:
            self._offsets = array("Q", self._string_offsets())
        return self._string(self._offsets[index])

    def __iter__(self) -> Iterator[Any]:
        if not self._letter:
            return map(self._string, self._string_offsets())
        size = struct.calcsize("<" + self._letter)
        numbers = struct.iter_unpack(
            "<" + self._letter, memoryview(self._data)[self._begin : self._begin + size * self._count]
        )
        return (number for (number,) in numbers)

    def tolist(self) -> list:
        return list(self)

    def __repr__(self) -> str:
        return f"<{self._count} x {self.kind} of '{self._key}'>"

    def _string_offsets(self) -> Iterator[int]:
        at = self._begin
        for _ in range(self._count):
            yield at
            at += 8 + _U64.unpack_from(self._data, at)[0]

    def _string(self, at: int) -> str:
        (length,) = _U64.unpack_from(self._data, at)
        return decode(self._path, self._data[at + 8 : at + 8 + length], f"a string of metadata '{self._key}'")


@dataclass(frozen=True)
class _String:
    path: str
    data: Any
    key: str
    begin: int
    end: int

    def decoded(self) -> str:
        return decode(self.path, self.data[self.begin : self.end], f"metadata '{self.key}'")


class Metadata(Mapping[str, Any]):
    """Key -> bool, int, float, str or GgufArray, read-only, in the order of the file.

    Raises KeyError for a key that is not there, CheckpointError for a string that is not UTF-8.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return value.decoded() if isinstance(value, _String) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<metadata of {len(self)} keys: {', '.join(islice(self, 4))}, ...>"


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """`count` entries from the cursor on; raises CheckpointError."""
    cursor.check_count(count, _LEAST_ENTRY, "metadata entries")
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("the key of a metadata entry")
        if key in values:
            raise damaged(cursor.path, f"metadata '{key}' is there twice")
        values[key] = _read_value(cursor, key)
    return Metadata(values)


def _read_value(cursor: Cursor, key: str) -> Any:
    what = f"the value of metadata '{key}'"
    kind = cursor.u32(what)
    if kind == _STRING:
        length = cursor.u64(what)
        return _String(cursor.path, cursor.data, key, cursor.skip(length, what), cursor.at)
    if kind in _SCALARS:
        letter = "<" + _SCALARS[kind]
        return struct.unpack_from(letter, cursor.data, cursor.skip(struct.calcsize(letter), what))[0]
    if kind != _ARRAY:
        raise _unknown_kind(cursor, key, f"type {kind}")
    kind, length = cursor.u32(what), cursor.u64(what)
    begin = cursor.at
    if kind == _STRING:
        cursor.skip_strings(length, what)
    elif kind in _SCALARS:
        cursor.skip(length * struct.calcsize("<" + _SCALARS[kind]), what)
    else:
        raise _unknown_kind(
            cursor, key, "arrays in an array" if kind == _ARRAY else f"elements of type {kind}"
        )
    return GgufArray(cursor, key, kind, begin, length)


def _unknown_kind(cursor: Cursor, key: str, seen: str) -> CheckpointError:
    return CheckpointError(
        f"file '{cursor.path}' is damaged or newer than this program: metadata '{key}' has {seen}, expected "
        f"{', '.join(_NAMES.values())} or an array of one of these."
    )
