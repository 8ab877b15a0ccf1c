"""Methods of float8_e4m3 codes (csrc/formats/e4m3.h): they differ in what shares a scale."""

from __future__ import annotations

import torch

from kt_kernel.formats import values
from kt_kernel.formats.quantize.fp8 import to_fp8_blocks, to_fp8_rows, to_mxfp8
from kt_kernel.formats.record import WHOLE_ROW, Encoding, MethodRecord, Storage
from kt_kernel.formats.shapes import (
    BLOCK,
    one_scale_per_row,
    per_32_columns,
    per_block,
    per_row,
    plain,
    scales_in_every_row,
)

_E4M3 = torch.float8_e4m3fn
_CODES = {"F8_E4M3": plain}
_LARGEST = 448.0

# One publisher calls the scales so, another so: dtype and shape tell the methods apart.
SCALES = ("weight_scale_inv", "weight_scale", "scale")

FP8 = MethodRecord(
    name="FP8",
    weights="safetensors with float8_e4m3 experts and one scale per 128x128 block",
    storage=(
        Storage(
            weight="weight",
            weight_shapes=_CODES,
            scales=SCALES,
            scale_dtypes=("F32", "BF16", "F8_E8M0"),
            scale_shape=per_block,
        ),
    ),
    encoding=Encoding(codes=_E4M3, scales=torch.float32, rows_per_scale=BLOCK, columns_per_scale=BLOCK),
    decode=values.float8_blocks,
    quantise=lambda matrix, _: to_fp8_blocks(matrix),
    largest_code=_LARGEST,
    config_rules="blocks",
)

FP8_PERCHANNEL = MethodRecord(
    name="FP8_PERCHANNEL",
    weights="safetensors with float8_e4m3 experts and one scale per output row",
    storage=(
        Storage(
            weight="weight",
            weight_shapes=_CODES,
            scales=SCALES,
            scale_dtypes=("BF16", "F16", "F32"),
            scale_shape=per_row,
            told_by=one_scale_per_row,
        ),
    ),
    encoding=Encoding(codes=_E4M3, scales=torch.float32, columns_per_scale=WHOLE_ROW),
    decode=values.float8_rows,
    quantise=lambda matrix, _: to_fp8_rows(matrix),
    largest_code=_LARGEST,
)

MXFP8 = MethodRecord(
    name="MXFP8",
    weights="safetensors with float8_e4m3 experts and one power-of-two scale per 32 inputs",
    columns_multiple=32,
    storage=(
        Storage(
            weight="weight",
            weight_shapes=_CODES,
            scales=SCALES,
            scale_dtypes=("F8_E8M0", "U8"),
            scale_shape=per_32_columns,
            told_by=scales_in_every_row,
        ),
    ),
    encoding=Encoding(codes=_E4M3, scales=torch.uint8, columns_per_scale=32),
    decode=values.float8_groups,
    quantise=lambda matrix, _: to_mxfp8(matrix),
    largest_code=_LARGEST,
)
