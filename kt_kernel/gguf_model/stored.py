"""Blocks of a GGUF file as the matrix of a dense layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kt_kernel.formats.dense_matrix import DenseMatrix, has_kernels
from kt_kernel.formats.record import WHOLE_ROW
from kt_kernel.gguf.experts import METHOD
from kt_kernel.gguf.types import GgmlType
from kt_kernel.gguf_model.decoding import decode_rows

# Types that are numbers already: a model holds them in a type of its own.
_NUMBERS = ("F32", "F16", "BF16")


def is_kept_type(kind: GgmlType) -> bool:
    """Are matrices of this type computed with as they are?"""
    return kind.name not in _NUMBERS and has_kernels(METHOD, kind.name)


def block_matrix(name: str, blocks: torch.Tensor, kind: GgmlType, release: Callable[[], None]) -> DenseMatrix:
    """Rows of blocks, contiguous uint8 [rows, bytes of a row], of a type that is kept.

    `release`: see DenseMatrix.
    """
    return DenseMatrix(
        name=name,
        method=METHOD,
        format=kind.name,
        rows=blocks.shape[0],
        columns=blocks.shape[1] // kind.bytes * kind.columns,
        weight=blocks,
        scale=None,
        factor=1.0,
        group_size=WHOLE_ROW,
        numbers=lambda dtype: decode_rows(blocks, kind, dtype),
        release=release,
    )
