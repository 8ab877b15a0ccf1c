"""One layer's bfloat16 experts in the layout of a checkpoint for a method, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kt_kernel.errors import InputError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.quantize.fp4 import to_mxfp4, to_nvfp4
from kt_kernel.formats.quantize.fp8 import to_fp8_blocks, to_fp8_rows, to_mxfp8
from kt_kernel.formats.quantize.int4 import to_gptq_int4, to_packed_int4
from kt_kernel.formats.quantize.quantized import Quantized

_PER_ROW = 0
_GROUP_SIZES = (128, 64, 32, 16)

# float32 matrix [N, K], group size -> the checkpoint's tensors.
_QUANTISERS: dict[str, Callable[[torch.Tensor, int], Quantized]] = {
    "FP8": lambda matrix, _: to_fp8_blocks(matrix),
    "FP8_PERCHANNEL": lambda matrix, _: to_fp8_rows(matrix),
    "MXFP8": lambda matrix, _: to_mxfp8(matrix),
    "MXFP4": lambda matrix, _: to_mxfp4(matrix),
    "NVFP4": lambda matrix, _: to_nvfp4(matrix),
    "RAWINT4": to_packed_int4,
    "GPTQ_INT4": to_gptq_int4,
}

# Where the group size is free: the one that published checkpoints of the method use.
_USUAL_GROUP_SIZE = {"RAWINT4": 32, "GPTQ_INT4": 128}


def quantize_experts(
    method: str, gate: list[torch.Tensor], up: list[torch.Tensor], down: list[torch.Tensor]
) -> LayerExperts:
    """bfloat16 gate, up [I, H] and down [H, I] of each expert -> what a checkpoint would hold.

    Raises InputError for infinite or NaN weights, which no scale can represent (BF16 keeps them).
    """
    hidden, intermediate = down[0].shape
    group_size = _group_size(method, hidden, intermediate)

    def quantised(projection: str, matrices: list[torch.Tensor]) -> list[ExpertMatrix]:
        return [
            _quantize(method, f"{projection}_proj of expert {expert}", matrix, group_size)
            for expert, matrix in enumerate(matrices)
        ]

    return LayerExperts(
        quantised("gate", gate), quantised("up", up), quantised("down", down), group_size=group_size
    )


def _quantize(method: str, name: str, matrix: torch.Tensor, group_size: int) -> ExpertMatrix:
    if method == "BF16":
        return ExpertMatrix(name, matrix)
    values = matrix.float()
    if not values.isfinite().all():
        raise InputError(f"{name} holds infinite or NaN weights, which method {method} cannot represent.")
    result = _QUANTISERS[method](values, group_size)
    return ExpertMatrix(name, result.weight, result.scale, result.global_scale)


def _group_size(method: str, hidden: int, intermediate: int) -> int:
    """The usual size of the method, or the next smaller one that divides both widths, or whole rows."""
    usual = _USUAL_GROUP_SIZE.get(method, _PER_ROW)
    for size in _GROUP_SIZES:
        if size <= usual and hidden % size == 0 and intermediate % size == 0:
            return size
    return _PER_ROW
