"""One GGUF file, mapped into memory: tensors are views of the mapping, nothing is copied.

    byte 0  4         8          16          24
    | GGUF | version | tensors n | entries m | m metadata entries | n tensor entries | padding | data |

    metadata entry: key, type of the value (u32), value
    tensor entry:   name, dimensions (u32), that many extents (u64, columns first), type (u32), offset (u64)

All numbers are little-endian, strings are a u64 length and UTF-8, offsets count from the start of the data
and are multiples of the metadata's `general.alignment`. Versions 2 and 3 differ in nothing else.

The header is checked whole when the file is opened: a file that was cut off, or promises what cannot be, is
reported before any weight is read. What it promises is never allocated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from kt_kernel.checkpoint.mapped_file import MappedFile
from kt_kernel.errors import CheckpointError
from kt_kernel.gguf.cursor import Cursor, damaged
from kt_kernel.gguf.metadata import Metadata, read_metadata
from kt_kernel.gguf.types import TYPES, GgmlType, unknown_type

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # ggml, ggmf, ggjt, ggla: what came before GGUF
_MOST_DIMENSIONS = 4
_USUAL_ALIGNMENT = 32
_LARGEST_ALIGNMENT = 1 << 24
_LEAST_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor. `shape` is in torch's order, the columns that blocks cut last;
    `begin` and `end` count bytes from the start of the file.
    """

    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> str:
        """The type's name, "Q4_K"."""
        return self.type.name

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the bytes: as `shape`, but the last extent is the bytes of a row."""
        columns = self.shape[-1] if self.shape else 1
        return (*self.shape[:-1], columns // self.type.columns * self.type.bytes)


class GgufFile(MappedFile):
    """A GGUF file held open and mapped read-only until it is collected.

    Raises CheckpointPathError if it is not there, CheckpointError if it is not a whole GGUF file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        cursor = Cursor(path, self.map, self.size)
        _check_magic(cursor)
        self.version = _read_version(cursor)
        tensors = cursor.u64("the number of tensors")
        entries = cursor.u64("the number of metadata entries")
        self.metadata: Metadata = read_metadata(cursor, entries)
        self.tensors: dict[str, TensorInfo] = _read_tensors(cursor, tensors, _alignment(path, self.metadata))

    def info(self, name: str) -> TensorInfo:
        """The header's entry; raises MissingTensorError."""
        return self.extent(name)

    def view(self, name: str) -> torch.Tensor:
        """The tensor's bytes as a read-only view of the mapping: uint8 `TensorInfo.stored_shape`."""
        return self.raw(name).view(self.info(name).stored_shape)


def is_gguf_file(path: str) -> bool:
    """Does an existing file begin as GGUF files do?"""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _check_magic(cursor: Cursor) -> None:
    seen = bytes(cursor.data[: cursor.skip(len(MAGIC), "the first word") + len(MAGIC)])
    if seen in _OLD_MAGICS:
        raise CheckpointError(
            f"file '{cursor.path}' has the format {seen[::-1].decode()}, which GGUF has replaced; download "
            "the model as GGUF."
        )
    if seen != MAGIC:
        raise CheckpointError(
            f"file '{cursor.path}' is no GGUF file: it begins with {seen!r}, expected {MAGIC!r}."
        )


def _read_version(cursor: Cursor) -> int:
    version = cursor.u32("the version")
    if int.from_bytes(version.to_bytes(4, "big"), "little") in (1, *_VERSIONS):
        raise CheckpointError(
            f"file '{cursor.path}' is big-endian GGUF, expected little-endian; download the file for this "
            "kind of machine."
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"file '{cursor.path}' is GGUF version {version}, expected {' or '.join(map(str, _VERSIONS))}; "
            "convert the model again."
        )
    return version


def _alignment(path: str, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", _USUAL_ALIGNMENT)
    is_power = type(alignment) is int and alignment & (alignment - 1) == 0
    if not is_power or not 8 <= alignment <= _LARGEST_ALIGNMENT:
        raise damaged(
            path,
            f"general.alignment is {alignment!r}, expected a power of two from 8 to {_LARGEST_ALIGNMENT}",
        )
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """`count` entries from the cursor on, and the data behind them."""
    cursor.check_count(count, _LEAST_TENSOR_ENTRY, "tensors")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name = cursor.name("the name of a tensor")
        if name in tensors:
            raise damaged(cursor.path, f"tensor '{name}' is there twice")
        tensors[name] = _read_tensor(cursor, name, alignment)
    data_begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorInfo(info.type, info.shape, info.begin + data_begin, info.end + data_begin)
        for name, info in tensors.items()
    }
    _check_extents(cursor, tensors)
    return tensors


def _read_tensor(cursor: Cursor, name: str, alignment: int) -> TensorInfo:
    """`begin` and `end` count from the start of the data."""
    what = f"the entry of tensor '{name}'"
    dimensions = cursor.u32(what)
    if dimensions > _MOST_DIMENSIONS:
        raise _damaged(cursor, name, f"has {dimensions} dimensions, expected at most {_MOST_DIMENSIONS}")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    type_id, offset = cursor.u32(what), cursor.u64(what)
    if type_id not in TYPES:
        raise CheckpointError(
            f"tensor '{name}' in '{cursor.path}' has {unknown_type(type_id)}; known are "
            f"{', '.join(row.name for row in TYPES.values())}: take a file quantised to these."
        )
    row = TYPES[type_id]
    if 0 in shape:
        raise _damaged(cursor, name, f"has shape {list(shape)}, expected extents of at least 1")
    if (shape and shape[-1] % row.columns) or (not shape and row.columns != 1):
        raise _damaged(
            cursor,
            name,
            f"is {row.name} of shape {list(shape)}, expected a multiple of {row.columns} columns",
        )
    if offset % alignment:
        raise _damaged(
            cursor, name, f"begins at byte {offset} of the data, expected a multiple of {alignment}"
        )
    return TensorInfo(row, shape, offset, offset + row.size(shape))


def _check_extents(cursor: Cursor, tensors: dict[str, TensorInfo]) -> None:
    in_order = sorted(tensors.items(), key=lambda item: item[1].begin)
    for name, info in in_order:
        if info.end > cursor.size:
            raise _damaged(
                cursor,
                name,
                f"({info.dtype} {list(info.shape)}) ends at byte {info.end} and the file has {cursor.size} "
                "bytes",
            )
    for (first, before), (second, info) in itertools.pairwise(in_order):
        if info.begin < before.end:
            raise _damaged(
                cursor, second, f"begins at byte {info.begin}, inside '{first}', which ends at {before.end}"
            )


def _damaged(cursor: Cursor, name: str, seen: str) -> CheckpointError:
    return damaged(cursor.path, f"tensor '{name}' {seen}")
