"""Blocks of a GGUF file as numbers."""

from __future__ import annotations

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.gguf.model import GgufModel
from kt_kernel.gguf.types import GgmlType

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DECODED = {row["id"] for row in kt_kernel_ext.GGUF_TYPES}


def decode(file: GgufModel, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the file in memory of its own.

    `dtype`: float32, bfloat16 or float16; values are rounded once. Raises MissingTensorError, or
    FeatureUnavailableError for a type or dtype that is not decoded.
    """
    info = file.info(name)
    if info.type.id not in _DECODED or dtype not in _DTYPES:
        raise FeatureUnavailableError(
            f"not available yet: tensor '{name}' of '{file.path}' has the type {info.dtype}, which is not "
            f"decoded to {str(dtype).removeprefix('torch.')}."
        )
    return decode_rows(file.view(name), info.type, dtype)


def decode_rows(blocks: torch.Tensor, kind: GgmlType, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous rows of blocks, uint8 [..., bytes of a row], as numbers [..., columns]."""
    columns = blocks.shape[-1] // kind.bytes * kind.columns
    values = torch.empty((*blocks.shape[:-1], columns), dtype=dtype)
    rows = values.numel() // columns
    kt_kernel_ext.gguf_decode(kind.id, blocks.data_ptr(), rows, columns, values.data_ptr(), _DTYPES[dtype])
    return values
