"""Risk: the numpy formats that everything is measured against are wrong themselves, or misread the bytes.

Values worked out by hand from the OCP Microscaling and FP8 papers, compressed-tensors and GPTQ.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import (
    BF16,
    CODES,
    E2M1,
    E4M3,
    F16,
    F32,
    FORMATS,
    METHODS,
    ONE_PER_METHOD,
    OTHER_NAMES,
    Format,
    from_bf16,
    pack,
    random_matrix,
    to_bf16,
    unpack,
)
from gguf_blocks import GGUF_METHOD
from harness import ext


def test_every_method_of_the_extension_is_tested():
    assert set(ext.METHODS) == {*METHODS, *OTHER_NAMES, GGUF_METHOD}
    assert [format.method for format in ONE_PER_METHOD] == list(METHODS)
    assert len({str(format) for format in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("byte", "value"),
    [
        (0x00, 0.0),
        (0x01, 2.0**-9),  # the smallest subnormal
        (0x07, 7 * 2.0**-9),  # the largest
        (0x08, 2.0**-6),  # the smallest normal
        (0x38, 1.0),
        (0x39, 1.125),
        (0x40, 2.0),
        (0x45, 3.25),
        (0x7E, 448.0),  # the largest
        (0xB8, -1.0),
        (0xFE, -448.0),
        (0x87, -7 * 2.0**-9),
    ],
)
def test_e4m3_by_hand(byte, value):
    assert E4M3[byte] == value


def test_e4m3_as_a_whole():
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [0x7F, 0xFF]
    assert (np.diff(E4M3[:127]) > 0).all()
    assert np.array_equal(E4M3[:127], -E4M3[128:255])
    assert np.signbit(E4M3[0x80])
    assert np.array_equal(from_bf16(to_bf16(E4M3[:127])), E4M3[:127])


def test_e2m1_is_one_bit_of_mantissa_and_two_of_exponent():
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert E2M1[code] == (-magnitude if code & 8 else magnitude)


def test_bf16_by_hand():
    values = np.array([1.0, -2.0, 3.140625, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    bits = np.array([0x3F80, 0xC000, 0x4049, 0x3F80, 0x3F82], np.uint16)  # the last two are ties, to even
    assert np.array_equal(to_bf16(values), bits)
    assert from_bf16(bits)[2] == 3.140625


def test_rawint4_word_by_hand():
    """Columns 0 to 7 of a word are its nibbles from the lowest; 8 means zero."""
    matrix = Format("RAWINT4", 16, F32).matrix(
        np.array([[[8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7]]], np.uint8),
        np.array([[[0.5]]], np.float32),
    )
    assert matrix.weight.view(np.uint32).tolist() == [[[0xFEDCBA98, 0x76543210]]]
    assert matrix.weight.view(np.uint8)[0, 0, :2].tolist() == [0x98, 0xBA]
    assert matrix.decoded(0).tolist() == [[q * 0.5 for q in [*range(8), *range(-8, 0)]]]


def test_rawint4_rows_end_with_a_whole_word():
    matrix = Format("RAWINT4", 0, F32).matrix(
        np.full((1, 2, 10), 9, np.uint8), np.ones((1, 2, 1), np.float32)
    )
    assert matrix.weight.shape == (1, 2, 2)
    assert matrix.weight.view(np.uint32)[0, 0].tolist() == [0x99999999, 0xFFFFFF99]
    assert matrix.decoded(0).shape == (2, 10)


def test_gptq_words_run_down_the_columns():
    """Two output rows, sixteen columns in two groups of eight: word [j, n] holds columns 8 j .. of row n."""
    codes = np.array([[[8, 9, 10, 11, 12, 13, 14, 15] * 2, [0] * 8 + [15] * 8]], np.uint8)
    scales = np.array([[[1, 2], [3, 4]]], np.float16)  # [row, group]
    matrix = Format("GPTQ_INT4", 8, F16).matrix(codes, scales)
    assert matrix.weight.view(np.uint32).tolist() == [[[0xFEDCBA98, 0], [0xFEDCBA98, 0xFFFFFFFF]]]
    assert matrix.scale.tolist() == [[[1, 3], [2, 4]]]  # [group, row]
    assert matrix.decoded(0)[0].tolist() == [*range(8), *range(0, 16, 2)]
    assert matrix.decoded(0)[1].tolist() == [-24] * 8 + [28] * 8


def test_mxfp4_bytes_and_scales_by_hand():
    codes = np.zeros((1, 1, 64), np.uint8)
    codes[0, 0, :4] = [1, 2, 15, 7]
    codes[0, 0, 32] = 3
    matrix = Format("MXFP4").matrix(codes, np.array([[[127, 124]]], np.uint8))
    assert matrix.weight[0, 0, :2].tolist() == [0x21, 0x7F]  # even columns in the low nibble
    assert matrix.decoded(0)[0, [0, 1, 2, 3, 4, 32]].tolist() == [0.5, 1, -6, 6, 0, 1.5 / 8]


def test_nvfp4_has_two_scales():
    codes = np.full((1, 1, 32), 2, np.uint8)  # 1.0
    matrix = Format("NVFP4").matrix(codes, np.array([[[0x38, 0x01]]], np.uint8), np.array([0.25], np.float32))
    assert matrix.decoded(0)[0, [0, 15, 16, 31]].tolist() == [0.25, 0.25, 2.0**-11, 2.0**-11]


def test_mxfp8_extreme_scales():
    codes = np.full((1, 1, 64), 0x38, np.uint8)
    matrix = Format("MXFP8").matrix(codes, np.array([[[0, 254]]], np.uint8))
    assert matrix.decoded(0)[0, [0, 32]].tolist() == [2.0**-127, 2.0**127]


def test_fp8_blocks_are_128_by_128_and_the_last_are_ragged():
    scales = np.array([[[1, 2], [4, 8]]], np.float32)
    matrix = Format("FP8").matrix(np.full((1, 130, 129), 0x38, np.uint8), scales)
    decoded = matrix.decoded(0)
    assert decoded[[0, 127, 128, 129], 0].tolist() == [1, 1, 4, 4]
    assert decoded[[0, 127, 128, 129], 128].tolist() == [2, 2, 8, 8]


def test_fp8_per_channel_has_a_scale_per_row():
    scales = np.array([[1, 3]], np.float32)[..., None]
    matrix = Format("FP8_PERCHANNEL", scale_dtype=BF16).matrix(
        np.full((1, 2, 5), 0x40, np.uint8), to_bf16(scales)
    )
    assert matrix.decoded(0).tolist() == [[2.0] * 5, [6.0] * 5]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packing_loses_nothing_and_random_weights_are_neither_huge_nor_zero(format):
    rng = np.random.default_rng(1)
    rows, columns = 40, format.fit(192)
    if format.codes != "bf16":
        codes = rng.integers(
            0, 256 if CODES[format.method] == "e4m3" else 16, (2, rows, columns), dtype=np.uint8
        )
        packed = pack(format.method, codes)
        assert np.array_equal(unpack(format.method, packed, columns), codes)
        assert np.array_equal(unpack(format.method, packed[1], columns), codes[1])
    matrix = random_matrix(rng, format, 2, rows, columns)
    for expert in range(2):
        weights = matrix.decoded(expert)
        assert weights.shape == (rows, columns)
        assert 0.3 < np.square(weights).mean() * columns < 3
