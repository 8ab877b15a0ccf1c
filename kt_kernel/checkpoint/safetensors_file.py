"""One safetensors file, mapped into memory: tensors are views of the mapping, nothing is copied.

    byte 0        8                8 + n                              end of file
    | n (u64 LE)  | JSON header    | data: tensors at their offsets   |

The header is checked whole when the file is opened, so a file that was cut off is reported by name before
any weight is read, not by a crash in the middle.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import struct
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.checkpoint.mapped_file import MappedFile
from kt_kernel.errors import CheckpointError

# Names of the format -> torch dtypes. Types that torch cannot hold are known by name only: they appear
# in messages but cannot be viewed.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the limit the safetensors format itself sets


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile(MappedFile):
    """A safetensors file held open and mapped read-only until it is collected."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.tensors: dict[str, TensorInfo] = _read_header(path, self.map, self.size)

    def info(self, name: str) -> TensorInfo:
        """The header's entry; raises MissingTensorError."""
        return self.extent(name)

    def view(self, name: str) -> torch.Tensor:
        """The tensor as a read-only view of the mapping (a copy only if the file does not align it)."""
        info = self.info(name)
        dtype = TORCH_DTYPES[info.dtype]
        raw = self.raw(name)
        if info.begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)


def _read_header(path: str, file: mmap.mmap | bytes, size: int) -> dict[str, TensorInfo]:
    if file[:4] == b"GGUF":
        raise CheckpointError(
            f"file '{path}' is GGUF, expected safetensors; GGUF is read as it is, with method LLAMAFILE."
        )
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            f"file '{path}' is cut off: it has {size} bytes, less than a safetensors header."
        )
    (header_bytes,) = struct.unpack_from("<Q", file)
    if header_bytes > _LONGEST_HEADER:
        raise CheckpointError(
            f"file '{path}' is no safetensors file: its first 8 bytes promise a header of {header_bytes} "
            f"bytes, and the longest allowed is {_LONGEST_HEADER}."
        )
    data_begin = _LENGTH_BYTES + header_bytes
    if data_begin > size:
        raise CheckpointError(
            f"file '{path}' is cut off: its header needs {data_begin} bytes and the file has {size}; "
            "download it again."
        )
    try:
        entries = json.loads(file[_LENGTH_BYTES:data_begin], object_pairs_hook=without_repetition)
        entries.pop("__metadata__", None)
        tensors = {name: _parse_entry(entry, data_begin) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"file '{path}' has a damaged safetensors header: {error}; download it again."
        ) from error
    for name, info in tensors.items():
        _check_extent(path, name, info, data_begin, size)
    _check_disjoint(path, tensors)
    return tensors


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a ValueError if a name is in it twice, of which Python would keep the last."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' is in it twice")
        found[name] = value
    return found


def _parse_entry(entry: dict, data_begin: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(extent) for extent in entry["shape"])
    return TensorInfo(str(entry["dtype"]), shape, data_begin + int(begin), data_begin + int(end))


def _check_disjoint(path: str, tensors: dict[str, TensorInfo]) -> None:
    in_order = sorted(tensors.items(), key=lambda entry: (entry[1].begin, entry[1].end))
    for (name, info), (next_name, following) in itertools.pairwise(in_order):
        if following.begin < info.end:
            raise CheckpointError(
                f"file '{path}' has a damaged header: tensor '{next_name}' begins at byte {following.begin}, "
                f"inside tensor '{name}', which ends at {info.end}; download it again."
            )


def _check_extent(path: str, name: str, info: TensorInfo, data_begin: int, size: int) -> None:
    if not data_begin <= info.begin <= info.end:
        raise CheckpointError(
            f"file '{path}' has a damaged header: tensor '{name}' would lie from byte {info.begin} to "
            f"{info.end}, and the data begin at {data_begin}; download it again."
        )
    if info.end > size:
        raise CheckpointError(
            f"file '{path}' is cut off: tensor '{name}' ends at byte {info.end} and the file has {size} "
            "bytes; download it again."
        )
    if info.dtype not in TORCH_DTYPES:
        return
    expected = math.prod(info.shape) * TORCH_DTYPES[info.dtype].itemsize
    if min(info.shape, default=0) < 0 or info.end - info.begin != expected:
        raise CheckpointError(
            f"file '{path}' has a damaged header: tensor '{name}' is {info.dtype} {list(info.shape)}, which "
            f"is {expected} bytes, but its place in the file holds {info.end - info.begin}."
        )
