"""One tensor of a GGUF file as numbers."""

from __future__ import annotations

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.gguf.model import GgufModel

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DECODED = {row["id"] for row in kt_kernel_ext.GGUF_TYPES}


def decode(file: GgufModel, name: str, dtype: torch.dtype, at: int | None = None) -> torch.Tensor:
    """The tensor, or the matrix `at` of one with three dimensions, in memory of its own.

    `dtype`: float32, bfloat16 or float16; values are rounded once. Raises MissingTensorError, or
    FeatureUnavailableError for a type or dtype that is not decoded.
    """
    info = file.info(name)
    if info.type.id not in _DECODED or dtype not in _DTYPES:
        raise FeatureUnavailableError(
            f"not available yet: tensor '{name}' of '{file.path}' has the type {info.dtype}, which is not "
            f"decoded to {str(dtype).removeprefix('torch.')}."
        )
    blocks = file.view(name) if at is None else file.view(name)[at]
    shape = info.shape if at is None else info.shape[1:]
    values = torch.empty(shape, dtype=dtype)
    columns = shape[-1]
    kt_kernel_ext.gguf_decode(
        info.type.id,
        blocks.data_ptr(),
        values.numel() // columns,
        columns,
        values.data_ptr(),
        _DTYPES[dtype],
    )
    return values
