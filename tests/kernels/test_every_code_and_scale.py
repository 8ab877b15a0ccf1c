"""Risk: one code, one scale or one place of a matrix is decoded as another, too rarely for an error norm.

Layers are built so that their outputs are the elements of one matrix, a token for each of its columns. Hidden
states are unit vectors, `lift` is a power of two that keeps what passes through within the range of fp32:

    down   up is zero, gate is 2 lift times the identity; "swigluoai" with a vanishing alpha makes that
           gate / 2 * (up + 1): token t has h = lift in place t, and its output is lift * column t of down
    gate   the same with gate under test: up is zero, down is 2 lift times the identity
    up     gate is lift in every place (silu(64) is 64; a tiny lift is doubled, silu halves it), down is the
           identity

All that is exact in every format, so each element comes back with the rounding of its own code * scale and no
other, except that kernels that multiply pairs of bf16 round what they read of gate and up to bf16. All tokens
at once take the path that decodes blocks of K for many tokens, single ones the one that decodes in registers.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import (
    BF16,
    F16,
    F32,
    FORMATS,
    ONE_PER_PATH,
    PLAIN,
    TABLES,
    Format,
    Matrix,
    encode,
    finite_codes,
    random_matrix,
    to_bf16,
)
from harness import SMALL_SWEEP, Call, Experts, build_layer, ext, keeps_swiglu_in_fp32, run, same_bits
from integers import exact_matrix

ENGINE = ext.Engine(2)
PARTS = ("gate", "up", "down")
CODED = [format for format in FORMATS if format != PLAIN]
# Int8 activations round what gate and up give, so only down is read back with them; its kernels are the same.
PARTS_AND_FORMATS = [
    *[pytest.param(part, format, id=f"{part}-{format}") for format in CODED for part in PARTS],
    *[
        pytest.param("down", format, id=f"down-{format}")
        for format in ONE_PER_PATH
        if format.activations == "int8"
    ],
]
# More columns than a block that the many-token path decodes, and not a multiple of it.
SIZE = 288
SINGLE_TOKENS = slice(None, None, 29 if SMALL_SWEEP else 3)
HALF = 1e-37  # as swiglu_alpha: sigmoid(HALF * gate) is 1/2 in fp32 for gates up to 1e29


def identity(format: Format, size: int, factor: float) -> Matrix:
    return constant(format, np.eye(size), factor)


def constant(format: Format, pattern: np.ndarray, factor: float) -> Matrix:
    """One expert with the weights factor * pattern: factor a power of two, pattern of zeros and ones."""
    exponent = int(np.log2(factor))
    return exact_matrix(
        np.random.default_rng(0), format, np.ldexp(pattern[None].astype(np.float32), exponent), (exponent,)
    )


def read_back(part: str, matrix: Matrix, lift: float = 64.0) -> np.ndarray:
    """The elements of a square matrix of one expert as the kernels see them, float64 [rows, columns]."""
    format, size = matrix.format, matrix.columns
    ones, zeros = np.ones((size, size)), np.zeros((size, size))
    gate, up, down = {
        "gate": lambda: (matrix, constant(format, zeros, 1), identity(format, size, 2 * lift)),
        "up": lambda: (
            constant(format, ones, lift if lift >= 64 else 2 * lift),
            matrix,
            identity(format, size, 1),
        ),
        "down": lambda: (identity(format, size, 2 * lift), constant(format, zeros, 1), matrix),
    }[part]()
    tokens = Call(
        to_bf16(np.eye(size, dtype=np.float32)), np.zeros((size, 1), np.int64), np.ones((size, 1), np.float32)
    )
    layer = build_layer(ENGINE, Experts(gate, up, down), top_k=1, swiglu_alpha=0.0 if part == "up" else HALF)
    together = run(layer, tokens)
    for t in range(size)[SINGLE_TOKENS]:
        assert same_bits(run(layer, tokens.rows([t])), together[[t]]), f"token {t} alone"
    return together.T.astype(np.float64) / lift


def assert_elements(actual: np.ndarray, expected: np.ndarray, relative_error: float = 0.0) -> None:
    wrong = np.argwhere(~(np.abs(actual - expected) <= relative_error * np.abs(expected)))
    assert len(wrong) == 0, (
        f"{len(wrong)} of {actual.size} elements are wrong, the first at [row, column] = {wrong[0]}: "
        f"{actual[tuple(wrong[0])]:g} instead of {expected[tuple(wrong[0])]:g}"
    )


def all_codes(format: Format, size: int, below: float = np.inf) -> np.ndarray:
    """Every finite code of a magnitude below the given one, in every row, one further in each next row."""
    codes = finite_codes(format.codes)
    codes = codes[np.abs(TABLES[format.codes][codes]) < below]
    row, column = np.ogrid[:size, :size]
    return codes[(row + column) % len(codes)][None]


# Relative error of a step that is one number: its int8 scale is a 127th of it.
SCALE_OF_ONE = {"bf16": 0.0, "int8": 2.0**-22}


def rounding(format: Format, part: str) -> float:
    """Allowed relative error: the products of code, scale and factor; bf16 between gate, up and down."""
    if part == "down" or keeps_swiglu_in_fp32(format):
        return 2.0**-22 + SCALE_OF_ONE[format.activations]
    return 2.0**-8


def test_the_formats_have_all_their_codes():
    counts = {format.codes: len(np.unique(all_codes(format, SIZE))) for format in CODED}
    assert counts == {"e4m3": 254, "int4": 16, "e2m1": 16, "int8": 256}


@pytest.mark.parametrize(("part", "format"), PARTS_AND_FORMATS)
def test_every_code_is_exact_in_every_row(format, part):
    size = format.fit(SIZE)
    rng = np.random.default_rng(1)
    exponents = rng.choice([-3, -2, -1, 0, 1, 2], (1, *format.scales_shape(size, size)))
    factor = np.array([4.0 if format.scale_kind == "e4m3" else 1.0], np.float32)
    matrix = format.matrix(all_codes(format, size), format.stored_scales(np.exp2(exponents)), factor)
    assert_elements(read_back(part, matrix), matrix.decoded(0), SCALE_OF_ONE[format.activations])


@pytest.mark.parametrize(("part", "format"), PARTS_AND_FORMATS)
def test_every_element_has_its_own_scale(format, part):
    size = format.fit(SIZE)
    matrix = random_matrix(np.random.default_rng(2), format, 1, size, size)
    assert_elements(read_back(part, matrix), matrix.decoded(0), rounding(format, part))


# ---- extreme scales -----------------------------------------------------------------------------

# ue8m0 byte -> (lift, codes below this magnitude): 2^-127 is a denormal, and 2 * 2^127 is too large for fp32.
UE8M0 = {
    0: (2.0**60, np.inf),
    1: (2.0**60, np.inf),
    127: (64.0, np.inf),
    253: (2.0**-60, 4),
    254: (2.0**-60, 2),
}


@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("byte", UE8M0)
@pytest.mark.parametrize("format", [f for f in CODED if f.scale_kind == "ue8m0"], ids=str)
def test_extreme_powers_of_two(format, byte, part):
    lift, below = UE8M0[byte]
    scales = np.full((1, *format.scales_shape(SIZE, SIZE)), byte, np.uint8)
    matrix = format.matrix(all_codes(format, SIZE, below), scales)
    assert_elements(read_back(part, matrix, lift), matrix.decoded(0))


@pytest.mark.parametrize("format", [f for f in CODED if f.scale_kind == "ue8m0"], ids=str)
def test_every_power_of_two_beside_every_other(format):
    """All 255 bytes, largest beside smallest: the denormal 2^-127 is not taken for zero either."""
    shape = (1, *format.scales_shape(SIZE, SIZE))
    scales = np.random.default_rng(3).permuted(np.resize(np.arange(255, dtype=np.uint8), shape), axis=None)
    scales = scales.reshape(shape)
    assert len(np.unique(scales)) == 255
    matrix = format.matrix(all_codes(format, SIZE, below=2), scales)
    assert_elements(read_back("down", matrix, lift=1.0), matrix.decoded(0))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("factor", [1.0, 2.0**-20])
def test_every_e4m3_scale_of_nvfp4(factor, part):
    """Subnormals, zeros and negative ones too: e2m1 * e4m3 has 6 significant bits at most."""
    format = Format("NVFP4")
    shape = (1, *format.scales_shape(SIZE, SIZE))
    scales = np.resize(finite_codes("e4m3"), shape)
    matrix = format.matrix(all_codes(format, SIZE), scales, np.array([factor], np.float32))
    assert_elements(read_back(part, matrix), matrix.decoded(0))


@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("factor", [1e-30, -1e30, 0.0, 3.7e-3])
def test_extreme_factors_of_nvfp4(factor, part):
    """With e4m3 scales that are subnormal, of the same size as others, and the largest."""
    format = Format("NVFP4")
    scales = np.resize(np.array([1, 7, 8, 0x38, 0x7E, 0x83], np.uint8), (1, *format.scales_shape(SIZE, SIZE)))
    matrix = format.matrix(all_codes(format, SIZE), scales, np.array([factor], np.float32))
    assert_elements(read_back(part, matrix), matrix.decoded(0), rounding(format, part))


# Powers of ten that a scale of the dtype may have; those of f16 reach into its subnormals.
DECADES = {F32: (-30, 30), BF16: (-30, 30), F16: (-7, 4.8)}


@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("format", [f for f in CODED if f.scale_kind == "float"], ids=str)
def test_extreme_scales_of_either_sign(format, part):
    size = format.fit(SIZE)
    rng = np.random.default_rng(4)
    shape = (1, *format.scales_shape(size, size))
    magnitudes = 10 ** rng.uniform(*DECADES[format.scale_dtype], shape)
    scales = encode((rng.choice([-1, 1], shape) * magnitudes).astype(np.float32), format.scale_dtype)
    matrix = format.matrix(all_codes(format, size), scales)
    assert_elements(read_back(part, matrix), matrix.decoded(0), rounding(format, part))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("format", [format for format in CODED if format.scale_kind != "ue8m0"], ids=str)
def test_scales_of_zero_make_zeros(format, part):
    """Where the format has a zero: ue8m0 does not."""
    size = format.fit(SIZE)
    scales = np.zeros((1, *format.scales_shape(size, size)), format.stored_scales(np.ones(1)).dtype)
    matrix = format.matrix(all_codes(format, size), scales)
    assert not read_back(part, matrix).any()
