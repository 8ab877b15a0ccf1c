"""The ggml types of tensors: the number in the file, the name, and how large a block is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kt_kernel.gguf.foreign_types import IK_LLAMA_CPP, REMOVED


@dataclass(frozen=True)
class GgmlType:
    """A row of a matrix is stored as blocks of `columns` values, `bytes` bytes each."""

    name: str
    id: int
    columns: int
    bytes: int

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape, whose last extent is a multiple of `columns`."""
        return math.prod(shape) // self.columns * self.bytes


_TABLE = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q8_1", 9, 32, 36),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
)

TYPES: dict[int, GgmlType] = {row.id: row for row in _TABLE}
TYPES_BY_NAME: dict[str, GgmlType] = {row.name: row for row in _TABLE}


def unknown_type(type_id: int) -> str:
    """What is known of a type that is not in the table, for messages: "type IQ4_K of ik_llama.cpp (139)"."""
    if type_id in IK_LLAMA_CPP:
        return f"type {IK_LLAMA_CPP[type_id]} of ik_llama.cpp ({type_id})"
    if type_id in REMOVED:
        return f"type {REMOVED[type_id]} ({type_id}), which ggml has removed"
    return f"the unknown type {type_id}"
