"""GGUF files written field by field, so that each field can be wrong: what a proper writer would refuse."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I32, F32, BOOL, STRING, ARRAY, U64, U32, U16 = 0, 5, 6, 7, 8, 9, 10, 4, 2
_LETTERS = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}
ALIGNMENT = 32


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """`content` of an array: (kind of the elements, list)."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        of, elements = content
        return struct.pack("<IQ", of, len(elements)) + b"".join(value(of, element) for element in elements)
    return struct.pack("<" + _LETTERS[kind], content)


def entry(key: str | bytes, kind: int, content: Any) -> bytes:
    return string(key) + struct.pack("<I", kind) + value(kind, content)


@dataclass
class Tensor:
    """`extents` in the order of the file, columns first; `offset` None = behind the tensor before it."""

    name: str | bytes
    extents: tuple[int, ...]
    type_id: int
    data: bytes
    offset: int | None = None


@dataclass
class Header:
    """Every count can be said wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    tensors: list[Tensor] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    tensor_count: int | None = None
    entry_count: int | None = None
    alignment: int = ALIGNMENT

    def bytes(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.metadata) if self.entry_count is None else self.entry_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.metadata)
        data = b""
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            head += string(tensor.name) + struct.pack("<I", len(tensor.extents))
            head += struct.pack(f"<{len(tensor.extents)}Q", *tensor.extents)
            head += struct.pack("<IQ", tensor.type_id, offset)
            data += tensor.data
        return head + bytes(-len(head) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def usual() -> Header:
    """A small valid file with every kind of field."""
    return Header(
        metadata=[
            entry("general.architecture", STRING, "qwen3moe"),
            entry("general.alignment", U32, ALIGNMENT),
            entry("qwen3moe.block_count", U32, 2),
            entry("qwen3moe.rope.freq_base", F32, 10000.0),
            entry("tokenizer.ggml.add_bos_token", BOOL, True),
            entry("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "ü", "", "longer token"])),
            entry("tokenizer.ggml.token_type", ARRAY, (I32, [1, 2, -3, 4])),
            entry("general.languages", ARRAY, (STRING, [])),
        ],
        tensors=[
            Tensor("token_embd.weight", (32, 4), 8, bytes(range(136))),
            Tensor("output_norm.weight", (8,), 0, struct.pack("<8f", *range(8))),
            Tensor("blk.0.ffn_up_exps.weight", (256, 2, 3), 12, bytes(6 * 144)),
        ],
    )


def part(number: int, of: int, tensors: list[Tensor], total: int, *more: bytes) -> Header:
    """One file of a split model; `more` metadata stand before those that say so."""
    said = [
        entry("split.no", U16, number),
        entry("split.count", U16, of),
        entry("split.tensors.count", I32, total),
    ]
    return Header(metadata=[*more, *said], tensors=tensors)
