"""Every weight format in plain numpy: tensors laid out as in a checkpoint, and the exact numbers they mean.

Written from the definitions of the formats, not from the extension; test_yardstick.py checks it by hand.

    format = Format("RAWINT4", group=32, scale_dtype=BF16)
    matrix = format.matrix(codes, scales)      one projection of all experts, as a checkpoint stores it
    matrix.decoded(expert)                     float64 [rows, columns], decoded from the stored bytes
    matrix.pointers()                          what MoeLayer.load_experts takes

Codes are one number per weight (bf16 bits, an e4m3 byte, a nibble) in [experts, rows, columns]; scales come
in the form in which they are stored, [experts, ceil(rows / rows of a block), groups of columns].

    method          codes  one scale for                  w =
    BF16            bf16   -                              code
    FP8             e4m3   128 rows x 128 columns         e4m3(code) * scale
    FP8_PERCHANNEL  e4m3   a row                          e4m3(code) * scale
    MXFP8           e4m3   32 columns of a row            e4m3(code) * 2^(scale - 127)
    RAWINT4         int4   `group` columns, 0 = the row   (code - 8) * scale
    GPTQ_INT4       int4   `group` columns, 0 = the row   (code - 8) * scale
    MXFP4           e2m1   32 columns of a row            e2m1(code) * 2^(scale - 127)
    NVFP4           e2m1   16 columns of a row            e2m1(code) * e4m3(scale) * factor of the matrix
    AMXINT4         int4   `group` columns, 0 = the row   (code - 8) * scale
    AMXINT8         int8   `group` columns, 0 = the row   code * scale

A Format also says what its layer multiplies the weights with: activations of bf16 or int8.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import numpy as np

BF16, F16, F32 = 0, 1, 2  # dtype codes of the extension
STORAGE = {BF16: np.uint16, F16: np.float16, F32: np.float32}
DTYPE_NAMES = {BF16: "bf16", F16: "f16", F32: "f32"}


# ---- numbers ------------------------------------------------------------------------------------


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """float values -> the storage of a dtype code, rounded to nearest even."""
    return to_bf16(values) if dtype == BF16 else values.astype(STORAGE[dtype])


def decode(stored: np.ndarray, dtype: int) -> np.ndarray:
    return from_bf16(stored) if dtype == BF16 else stored.astype(np.float32)


def e4m3(byte: int) -> float:
    """float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, S.1111.111 is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3(byte) for byte in range(256)])
E4M3_NAN = (0x7F, 0xFF)
INT4 = np.arange(16) - 8.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INT8 = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)  # by the byte
TABLES = {"e4m3": E4M3, "int4": INT4, "e2m1": E2M1, "int8": INT8}


def finite_codes(kind: str) -> np.ndarray:
    return np.flatnonzero(np.isfinite(TABLES[kind])).astype(np.uint8)


# ---- formats ------------------------------------------------------------------------------------

CODES = {
    "BF16": "bf16",
    "FP8": "e4m3",
    "FP8_PERCHANNEL": "e4m3",
    "MXFP8": "e4m3",
    "RAWINT4": "int4",
    "GPTQ_INT4": "int4",
    "MXFP4": "e2m1",
    "NVFP4": "e2m1",
    "AMXINT4": "int4",
    "AMXINT8": "int8",
}
METHODS = tuple(CODES)
OTHER_NAMES = {"MOE_INT4": "AMXINT4", "MOE_INT8": "AMXINT8"}
# What a scale is stored as; "float" is bf16, f16 or f32, as the caller says.
SCALES = {
    "BF16": None,
    "FP8": "float",
    "FP8_PERCHANNEL": "float",
    "MXFP8": "ue8m0",
    "RAWINT4": "float",
    "GPTQ_INT4": "float",
    "MXFP4": "ue8m0",
    "NVFP4": "e4m3",
    "AMXINT4": "float",
    "AMXINT8": "float",
}
FIXED_GROUPS = {"FP8": 128, "MXFP8": 32, "MXFP4": 32, "NVFP4": 16}
CHOOSE_GROUP = ("RAWINT4", "GPTQ_INT4", "AMXINT4", "AMXINT8")
# Codes that are small integers but for a factor: what int8 activations may be multiplied with.
INTEGER_CODES = ("int4", "e2m1", "int8")


@dataclass(frozen=True)
class Format:
    """A method, what a checkpoint may choose within it, and what its layer multiplies ("bf16" or "int8").

    group: columns, 0 = one scale per row.
    """

    method: str
    group: int = 0
    scale_dtype: int = F32
    activations: str = "bf16"

    def __str__(self) -> str:
        parts = [self.method]
        if self.method in CHOOSE_GROUP:
            parts.append(f"g{self.group}" if self.group else "row")
        if self.scale_kind == "float":
            parts.append(DTYPE_NAMES[self.scale_dtype])
        if self.activations != "bf16":
            parts.append(f"by-{self.activations}")
        return "-".join(parts)

    @property
    def codes(self) -> str:
        return CODES[self.method]

    @property
    def scale_kind(self) -> str | None:
        return SCALES[self.method]

    @property
    def block_rows(self) -> int:
        return 128 if self.method == "FP8" else 1

    def group_columns(self, columns: int) -> int:
        """Columns that share a scale, in a matrix of so many."""
        return FIXED_GROUPS.get(self.method) or self.group or columns

    @property
    def column_step(self) -> int:
        """The number of columns is a multiple of this."""
        if self.method in CHOOSE_GROUP:
            word = {"GPTQ_INT4": 8, "AMXINT8": 1}.get(self.method, 2)
            return math.lcm(self.group or 1, word)
        return {"MXFP8": 32, "MXFP4": 32, "NVFP4": 16}.get(self.method, 1)

    def fit(self, size: int) -> int:
        """`size` rounded up to a number of columns that the format can have."""
        return -(-size // self.column_step) * self.column_step

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.block_rows), -(-columns // self.group_columns(columns))

    def stored_scales(self, values: np.ndarray) -> np.ndarray:
        """Numbers -> the stored form of the nearest scales (ue8m0 and e4m3: of scales that are at least hit
        exactly when they can be)."""
        if self.scale_kind == "ue8m0":
            return (np.round(np.log2(values)) + 127).astype(np.uint8)
        if self.scale_kind == "e4m3":
            positive = E4M3[:127]  # ascending
            nearest = np.abs(np.asarray(values)[..., None] - positive).argmin(axis=-1)
            return nearest.astype(np.uint8)
        return encode(np.asarray(values, np.float32), self.scale_dtype)

    def scale_values(self, stored: np.ndarray) -> np.ndarray:
        """Stored scales -> exact float64, without the factor of NVFP4."""
        if self.scale_kind == "ue8m0":
            return np.ldexp(1.0, stored.astype(np.int64) - 127)
        if self.scale_kind == "e4m3":
            return E4M3[stored]
        return decode(stored, self.scale_dtype).astype(np.float64)

    def matrix(
        self, codes: np.ndarray, scales: np.ndarray | None = None, factors: np.ndarray | None = None
    ) -> Matrix:
        """Lays codes and stored scales (see the top of this file) out as a checkpoint does."""
        experts, rows, columns = codes.shape
        if scales is not None:
            assert scales.shape[1:] == self.scales_shape(rows, columns), (scales.shape, codes.shape)
            scales = scales.swapaxes(1, 2) if self.method == "GPTQ_INT4" else scales
            scales = np.ascontiguousarray(scales)
        if factors is None:
            factors = np.ones(experts, np.float32)
        return Matrix(self, rows, columns, pack(self.method, codes), scales, factors)


# ---- layouts ------------------------------------------------------------------------------------


WHOLE_CODES = ("bf16", "e4m3", "int8")  # a number of the tensor each
NIBBLE_PAIRS = ("MXFP4", "NVFP4", "AMXINT4")  # bytes: even columns low, odd columns high


def words_of_nibbles(nibbles: np.ndarray) -> np.ndarray:
    """[..., 8 n] nibbles -> [..., n] int32: nibble 8 j + i in bits 4 i .. 4 i + 3 of word j."""
    places = nibbles.reshape(*nibbles.shape[:-1], -1, 8).astype(np.uint32) << np.arange(
        0, 32, 4, dtype=np.uint32
    )
    return np.bitwise_or.reduce(places, axis=-1).view(np.int32)


def nibbles_of_words(words: np.ndarray) -> np.ndarray:
    nibbles = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return nibbles.reshape(*words.shape[:-1], -1).astype(np.uint8)


def pack(method: str, codes: np.ndarray) -> np.ndarray:
    """[..., rows, columns] codes -> the weight tensor of a checkpoint. Unused nibbles of RAWINT4 hold 15."""
    if CODES[method] in WHOLE_CODES:
        return np.ascontiguousarray(codes)
    if method in NIBBLE_PAIRS:
        return codes[..., 0::2] | codes[..., 1::2] << 4
    if method == "GPTQ_INT4":
        return np.ascontiguousarray(words_of_nibbles(codes).swapaxes(-1, -2))
    unused = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 8)]
    return words_of_nibbles(np.pad(codes, unused, constant_values=15))


def unpack(method: str, weight: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of pack."""
    if CODES[method] in WHOLE_CODES:
        return weight
    if method in NIBBLE_PAIRS:
        return np.stack([weight & 15, weight >> 4], axis=-1).reshape(*weight.shape[:-1], columns)
    if method == "GPTQ_INT4":
        return nibbles_of_words(np.ascontiguousarray(weight.swapaxes(-1, -2)))
    return nibbles_of_words(weight)[..., :columns]


@dataclass
class Matrix:
    """One projection of all experts: weight [experts, ...] and scale [experts, ...] as a checkpoint stores
    them, factor float32 [experts] (NVFP4's weight_scale_2, else 1)."""

    format: Format
    rows: int
    columns: int
    weight: np.ndarray
    scale: np.ndarray | None
    factor: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.weight), self.rows, self.columns

    def codes(self, expert: int) -> np.ndarray:
        return unpack(self.format.method, self.weight[expert], self.columns)

    def row_scales(self, expert: int) -> np.ndarray | None:
        """Stored scales as [blocks of rows, groups of columns]."""
        if self.scale is None:
            return None
        return self.scale[expert].T if self.format.method == "GPTQ_INT4" else self.scale[expert]

    def decoded(self, expert: int) -> np.ndarray:
        """Exact float64 [rows, columns]."""
        codes = self.codes(expert)
        if self.format.codes == "bf16":
            return from_bf16(codes).astype(np.float64)
        scales = self.format.scale_values(self.row_scales(expert)) * np.float64(self.factor[expert])
        scales = scales.repeat(self.format.block_rows, axis=0)[: self.rows]
        scales = scales.repeat(self.format.group_columns(self.columns), axis=1)[:, : self.columns]
        return TABLES[self.format.codes][codes] * scales

    def pointers(self) -> list[tuple[int, int, float]]:
        """(weight, scale, factor) of each expert, as MoeLayer.load_experts wants them."""
        return [
            (
                self.weight[e].ctypes.data,
                0 if self.scale is None else self.scale[e].ctypes.data,
                float(self.factor[e]),
            )
            for e in range(len(self.weight))
        ]

    def tensors(self) -> list[np.ndarray]:
        """All that is stored, expert by expert."""
        return [t[e] for e in range(len(self.weight)) for t in (self.weight, self.scale) if t is not None]


# ---- random matrices ----------------------------------------------------------------------------


def random_bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random bf16 of variance 1/columns: layers neither grow nor shrink. Truncated, which is quicker."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= shape[-1] ** -0.5
    return np.ascontiguousarray(values.view(np.uint16)[..., 1::2])


def random_matrix(rng: np.random.Generator, format: Format, experts: int, rows: int, columns: int) -> Matrix:
    """All finite codes equally often; scales within a factor of 4, so that the weights have a variance of
    about 1/columns."""
    if format.codes == "bf16":
        return format.matrix(random_bf16(rng, experts, rows, columns))
    finite = finite_codes(format.codes)
    codes = finite[rng.integers(0, len(finite), (experts, rows, columns), dtype=np.uint8)]
    typical = (np.square(TABLES[format.codes][finite]).mean() * columns) ** -0.5
    spread = np.exp2(rng.uniform(-1, 1, (experts, *format.scales_shape(rows, columns))))
    factors = np.ones(experts, np.float32)
    if format.scale_kind == "e4m3":
        factors = (typical * rng.uniform(0.07, 0.14, experts)).astype(np.float32)
        stored = format.stored_scales(spread * 10)
    else:
        stored = format.stored_scales(spread * typical)
    return format.matrix(codes, stored, factors)


# ---- what the tests walk through ----------------------------------------------------------------

SWEEP = os.environ.get("KT_TEST_SWEEP", "all")  # or "capped", "small"
SMALL_SWEEP = SWEEP == "small"

# One format per method, the one most checkpoints use: for wide sweeps.
PLAIN = Format("BF16")
ONE_PER_METHOD = (
    PLAIN,
    Format("FP8"),
    Format("FP8_PERCHANNEL"),
    Format("MXFP8"),
    Format("RAWINT4", 32, BF16),
    Format("GPTQ_INT4", 128, F16),
    Format("MXFP4"),
    Format("NVFP4"),
    Format("AMXINT4", 128),
    Format("AMXINT8"),
)
ONE_OF_EACH_CODE = tuple(f for f in ONE_PER_METHOD if f.method in ("RAWINT4", "MXFP4", "AMXINT8"))
# Other dtypes of scales; groups below, at and above the 128 columns of a kernel's longest step, some that do
# not divide it; one scale per row. Methods of the same codes differ in how their checkpoints are read alone.
FORMATS = (
    *ONE_PER_METHOD,
    Format("FP8", scale_dtype=BF16),
    Format("FP8_PERCHANNEL", scale_dtype=BF16),
    Format("FP8_PERCHANNEL", scale_dtype=F16),
    Format("RAWINT4", 16, F32),
    Format("RAWINT4", 32, F16),
    Format("RAWINT4", 48, BF16),
    Format("RAWINT4", 64, F32),
    Format("RAWINT4", 128, BF16),
    Format("RAWINT4", 256, F16),
    Format("RAWINT4", 320, F32),
    *[Format("RAWINT4", 0, dtype) for dtype in (BF16, F16, F32)],
    Format("GPTQ_INT4", 16, BF16),
    Format("GPTQ_INT4", 160, F32),
    Format("GPTQ_INT4", 0, F16),
    *[Format("AMXINT8", group) for group in (16, 48, 256)],
)
if SMALL_SWEEP:
    FORMATS = (
        *ONE_PER_METHOD,
        Format("FP8_PERCHANNEL", scale_dtype=F16),
        Format("RAWINT4", 48, BF16),
        Format("RAWINT4", 0, F32),
        Format("GPTQ_INT4", 16, BF16),
        Format("AMXINT8", 32),
    )


def by_int8(formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """Those of the formats that int8 activations can be multiplied with, multiplied with them."""
    return tuple(replace(f, activations="int8") for f in formats if f.codes in INTEGER_CODES)


# Codes, steps and types of scales, which is all that kernels with int8 activations know of a method.
INT8_PATHS = tuple(
    dict.fromkeys(by_int8((*ONE_PER_METHOD, *[f for f in FORMATS if f.method in ("RAWINT4", "AMXINT8")])))
)
# What the tests walk through: weights with either kind of activations. Capped processes must give the bits of
# one that walks through all (test_every_cpu_variant.py): with int8 they take each type of codes once.
ONE_PER_PATH = (*ONE_PER_METHOD, *by_int8(ONE_PER_METHOD))
PATHS = (*FORMATS, *INT8_PATHS)
if SWEEP != "all":
    ONE_PER_PATH = (*ONE_PER_METHOD, *[f for f in INT8_PATHS if f in by_int8(ONE_OF_EACH_CODE)])
    PATHS = (*FORMATS, *ONE_PER_PATH[len(ONE_PER_METHOD) :])
