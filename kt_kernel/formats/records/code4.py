"""Methods of 4-bit codes (csrc/formats/code4.h): symmetric integers, or E2M1."""

from __future__ import annotations

import torch

from kt_kernel.formats import values
from kt_kernel.formats.quantize.fp4 import to_mxfp4, to_nvfp4
from kt_kernel.formats.quantize.int4 import to_gptq_int4, to_packed_int4
from kt_kernel.formats.record import Encoding, Extra, GlobalScale, MethodRecord, Storage
from kt_kernel.formats.records.float8 import SCALES
from kt_kernel.formats.shapes import (
    eight_per_word,
    eight_per_word_down_k,
    per_16_columns,
    per_32_columns,
    per_group,
    per_group_down_k,
    sixteen_per_32_columns,
    two_per_byte,
)

_FLOATS = ("BF16", "F16", "F32")
_POWERS_OF_TWO = ("F8_E8M0", "U8")
_BYTE_PAIRS = {"U8": two_per_byte, "I8": two_per_byte}
_LARGEST_INT4, _LARGEST_E2M1, _LARGEST_E4M3 = 7.0, 6.0, 448.0

RAWINT4 = MethodRecord(
    name="RAWINT4",
    weights="safetensors with symmetric 4-bit experts of compressed-tensors, any group size",
    columns_multiple=8,
    storage=(
        Storage(
            weight="weight_packed",
            weight_shapes={"I32": eight_per_word, "U8": two_per_byte},
            scales=("weight_scale",),
            scale_dtypes=_FLOATS,
            scale_shape=per_group,
            group_axis=1,
            extras=(
                Extra("weight_zero_point", "zero points"),
                Extra("weight_g_idx", "another order of the columns"),
            ),
        ),
    ),
    encoding=Encoding(codes=torch.int32, columns_per_code=8, scales_of_checkpoint=True),
    decode=values.packed_int4,
    quantise=to_packed_int4,
    usual_group_size=32,
    largest_code=_LARGEST_INT4,
    config_rules="compressed-tensors",
)

MXFP4 = MethodRecord(
    name="MXFP4",
    weights="safetensors with E2M1 experts and one power-of-two scale per 32 inputs",
    columns_multiple=32,
    storage=(
        Storage(
            weight="weight",
            weight_shapes=_BYTE_PAIRS,
            scales=SCALES,
            scale_dtypes=_POWERS_OF_TWO,
            scale_shape=per_32_columns,
        ),
        Storage(
            weight="weight_packed",
            weight_shapes=_BYTE_PAIRS,
            scales=("weight_scale",),
            scale_dtypes=_POWERS_OF_TWO,
            scale_shape=per_32_columns,
        ),
        Storage(
            weight="blocks",
            weight_shapes={"U8": sixteen_per_32_columns},
            scales=("scales",),
            scale_dtypes=_POWERS_OF_TWO,
            scale_shape=per_32_columns,
        ),
    ),
    encoding=Encoding(codes=torch.uint8, columns_per_code=2, scales=torch.bfloat16, columns_per_scale=32),
    decode=values.mxfp4,
    quantise=lambda matrix, _: to_mxfp4(matrix),
    largest_code=_LARGEST_E2M1,
)

NVFP4 = MethodRecord(
    name="NVFP4",
    weights="safetensors with E2M1 experts, one float8 scale per 16 inputs and a global scale",
    columns_multiple=16,
    storage=(
        Storage(
            weight="weight",
            weight_shapes={"U8": two_per_byte},
            scales=("weight_scale",),
            scale_dtypes=("F8_E4M3",),
            scale_shape=per_16_columns,
            global_scale=GlobalScale("weight_scale_2", 1),
        ),
        Storage(
            weight="weight_packed",
            weight_shapes={"U8": two_per_byte},
            scales=("weight_scale",),
            scale_dtypes=("F8_E4M3",),
            scale_shape=per_16_columns,
            global_scale=GlobalScale("weight_global_scale", -1),
        ),
    ),
    encoding=Encoding(
        codes=torch.uint8,
        columns_per_code=2,
        scales=torch.float8_e4m3fn,
        columns_per_scale=16,
        global_scales=True,
    ),
    decode=values.nvfp4,
    quantise=lambda matrix, _: to_nvfp4(matrix),
    largest_code=_LARGEST_E2M1 * _LARGEST_E4M3,
)

GPTQ_INT4 = MethodRecord(
    name="GPTQ_INT4",
    weights="safetensors with symmetric GPTQ 4-bit experts, without activation reordering",
    columns_multiple=8,
    storage=(
        Storage(
            weight="qweight",
            weight_shapes={"I32": eight_per_word_down_k},
            scales=("scales",),
            scale_dtypes=_FLOATS,
            scale_shape=per_group_down_k,
            group_axis=0,
            # A zero point of 8 in each of a word's nibbles, as GPTQ's first file format (8 - 1) and its
            # second write it; the words are signed.
            extras=(Extra("qzeros", "zero points other than 8", (0x77777777, -0x77777778)),),
        ),
    ),
    encoding=Encoding(codes=torch.int32, columns_per_code=8, scales_of_checkpoint=True, transposed=True),
    decode=values.gptq_int4,
    quantise=to_gptq_int4,
    usual_group_size=128,
    largest_code=_LARGEST_INT4,
    config_rules="gptq",
)
