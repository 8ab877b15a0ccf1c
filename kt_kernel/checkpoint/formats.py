"""How published checkpoints store one expert matrix, as data.

A matrix of N output rows and K input columns is stored as tensors `{stem}.{suffix}`, where the stem ends in
the projection's name: codes, scales, sometimes a global scale. One row of FORMATS is one way to store it; a
new way is a new row. Which numbers the codes mean is the kernels' business (`csrc/formats/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# (N, K, group size in columns or 0 for one group per row) -> the shapes allowed, the usual one first.
ShapeRule = Callable[[int, int, int], tuple[Shape, ...]]

BLOCK = 128  # rows and columns that share a scale in block-scaled float8


def _plain(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k),)


def _two_per_byte(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 2),)


def _eight_per_word(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, -(-k // 8)),)


def _eight_per_word_down_k(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((k // 8, n),)


def _per_block(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((-(-n // BLOCK), -(-k // BLOCK)),)


def _per_row(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, 1), (n,))


def _per_32_columns(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 32),)


def _per_16_columns(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 16),)


def _per_group(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // group),) if group else ((n, 1), (n,))


def _per_group_down_k(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((k // group, n),) if group else ((1, n), (n,))


def _any(weight: Shape, scale: Shape) -> bool:
    return True


def _one_scale_per_row(weight: Shape, scale: Shape) -> bool:
    return len(scale) == 1 or scale == (weight[0], 1)


def _scales_in_every_row(weight: Shape, scale: Shape) -> bool:
    return len(scale) == 2 and scale[0] == weight[0]


@dataclass(frozen=True)
class GlobalScale:
    """A float32 scalar for a whole matrix: w = code * scale * value ** power."""

    suffix: str
    power: int


@dataclass(frozen=True)
class Extra:
    """A tensor beside the codes that the kernels have no place for: refused unless it changes nothing."""

    suffix: str
    meaning: str
    harmless_values: tuple[int, ...] = ()


_BIAS = Extra("bias", "a bias", (0,))


@dataclass(frozen=True)
class Format:
    """One row: dtypes are safetensors' names, the first of several suffixes that exists counts."""

    method: str
    weight: str
    weight_shapes: Mapping[str, ShapeRule]  # dtype of the codes -> their shape
    scales: tuple[str, ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    scale_shape: ShapeRule = _plain
    told_by: Callable[[Shape, Shape], bool] = _any  # shapes of codes and scales, where the dtypes leave doubt
    group_axis: int | None = None  # the axis of the scales that counts groups, where their size is free
    global_scale: GlobalScale | None = None
    extras: tuple[Extra, ...] = (_BIAS,)


_FLOAT8_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_FLOATS = ("BF16", "F16", "F32")
_POWERS_OF_TWO = ("F8_E8M0", "U8")
_BYTE_PAIRS: Mapping[str, ShapeRule] = {"U8": _two_per_byte, "I8": _two_per_byte}

# The first row that fits counts: FP8, which takes any scales that the rows above it leave, comes after them.
FORMATS: tuple[Format, ...] = (
    Format("BF16", "weight", {"BF16": _plain}),
    Format(
        "FP8_PERCHANNEL",
        "weight",
        {"F8_E4M3": _plain},
        _FLOAT8_SCALES,
        _FLOATS,
        _per_row,
        told_by=_one_scale_per_row,
    ),
    Format(
        "MXFP8",
        "weight",
        {"F8_E4M3": _plain},
        _FLOAT8_SCALES,
        _POWERS_OF_TWO,
        _per_32_columns,
        told_by=_scales_in_every_row,
    ),
    Format(
        "FP8",
        "weight",
        {"F8_E4M3": _plain},
        _FLOAT8_SCALES,
        ("F32", "BF16", "F8_E8M0"),
        _per_block,
    ),
    Format("MXFP4", "weight", _BYTE_PAIRS, _FLOAT8_SCALES, _POWERS_OF_TWO, _per_32_columns),
    Format("MXFP4", "weight_packed", _BYTE_PAIRS, ("weight_scale",), _POWERS_OF_TWO, _per_32_columns),
    Format(
        "NVFP4",
        "weight",
        {"U8": _two_per_byte},
        ("weight_scale",),
        ("F8_E4M3",),
        _per_16_columns,
        global_scale=GlobalScale("weight_scale_2", 1),
    ),
    Format(
        "NVFP4",
        "weight_packed",
        {"U8": _two_per_byte},
        ("weight_scale",),
        ("F8_E4M3",),
        _per_16_columns,
        global_scale=GlobalScale("weight_global_scale", -1),
    ),
    Format(
        "RAWINT4",
        "weight_packed",
        {"I32": _eight_per_word, "U8": _two_per_byte},
        ("weight_scale",),
        _FLOATS,
        _per_group,
        group_axis=1,
        extras=(
            _BIAS,
            Extra("weight_zero_point", "zero points"),
            Extra("weight_g_idx", "another order of the columns"),
        ),
    ),
    Format(
        "GPTQ_INT4",
        "qweight",
        {"I32": _eight_per_word_down_k},
        ("scales",),
        _FLOATS,
        _per_group_down_k,
        group_axis=0,
        # A zero point of 8 in each of a word's nibbles, as GPTQ's first file format (8 - 1) and its second
        # write it; the words are signed.
        extras=(_BIAS, Extra("qzeros", "zero points other than 8", (0x77777777, -0x77777778))),
    ),
)
