"""Where the tensors of a shard lie in its file, known from the shapes alone.

    byte 0       8                            a multiple of 64
    | n (u64 LE) | JSON header, then spaces   | expert 0: gate codes, gate scales, up ..., down ... | ...

The header's metadata says what the shard was made of and how; the place of its source's hash, which is known
only at the end, is kept by zeros.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from kt_kernel.checkpoint.families import LAYER_PREFIXES, PUBLISHED
from kt_kernel.convert.targets import Target

VERSION = "1"  # of the files written; another one cannot be continued
PROJECTIONS = (PUBLISHED.gate, PUBLISHED.up, PUBLISHED.down)

_ALIGNMENT = 64
_NO_HASH = "0" * 64
_HASH_KEY = b'"kt_source_hash":"'


@dataclass(frozen=True)
class LayerShape:
    """One layer of experts: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    index: int
    experts: int
    hidden: int
    intermediate: int

    def matrix(self, projection: str) -> tuple[int, int]:
        """Rows and columns."""
        wide = (self.intermediate, self.hidden)
        return wide if projection != PUBLISHED.down else wide[::-1]


@dataclass(frozen=True)
class ShardLayout:
    """`places`: tensor -> its first byte in the file. `hash_at`: where the source's hash belongs."""

    header: bytes
    hash_at: int
    places: dict[str, int]
    file_bytes: int

    def is_header_of(self, found: bytes) -> bool:
        """Is `found` this header, whatever source hash it has?"""
        end = self.hash_at + len(_NO_HASH)
        return found[: self.hash_at] + _NO_HASH.encode() + found[end:] == self.header

    def hash_in(self, found: bytes) -> str:
        return found[self.hash_at : self.hash_at + len(_NO_HASH)].decode("ascii", "replace")


def shard_name(layer: int) -> str:
    return f"model-layer-{layer:05d}.safetensors"


def tensor_names(layer: int, expert: int, projection: str) -> tuple[str, str]:
    """(codes, scales)"""
    stem = f"{LAYER_PREFIXES[0].format(layer=layer)}.{PUBLISHED.path}.{expert}.{projection}"
    return f"{stem}.weight", f"{stem}.weight_scale"


def shard_layout(shape: LayerShape, target: Target, source_sample: str = _NO_HASH) -> ShardLayout:
    """The file of one layer; `source_sample`, 64 digits, says from which weights it is made."""
    metadata = {
        "format": "pt",
        "kt_version": VERSION,
        "kt_method": target.method,
        "kt_group_size": str(target.group_size),
        "kt_source_sample": source_sample,
        "kt_source_hash": _NO_HASH,
    }
    entries, offset = {}, 0
    for expert in range(shape.experts):
        for projection in PROJECTIONS:
            rows, columns = shape.matrix(projection)
            for name, dtype, extents, size in zip(
                tensor_names(shape.index, expert, projection),
                (target.code_dtype, "F32"),
                (target.code_shape(rows, columns), target.scale_shape(rows, columns)),
                (1, 4),
                strict=True,
            ):
                end = offset + extents[0] * extents[1] * size
                entries[name] = {"dtype": dtype, "shape": extents, "data_offsets": (offset, end)}
                offset = end
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    places = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return ShardLayout(header, header.index(_HASH_KEY) + len(_HASH_KEY), places, len(header) + offset)
