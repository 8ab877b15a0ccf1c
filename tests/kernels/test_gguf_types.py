"""Risk: a block of a ggml type that is read as other numbers than the format defines.

The measure is the `gguf` package, written by others: random bytes as blocks, every number equal in every bit.
"""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from extension import ext
from gguf import quants

SEED = 20261130
TYPES = {type_["name"]: type_ for type_ in ext.GGUF_TYPES}
BLOCKS = 512
# Where a block keeps the fp16 numbers that everything else is multiplied with.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
# Zeros of either sign, subnormals, the smallest normal, one, the largest.
SPECIAL_HALVES = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF], "<u2"
)


def put_halves(name: str, blocks: np.ndarray, halves: np.ndarray) -> None:
    """Sets all fp16 scales of blocks [n, bytes] to those of [n]."""
    for at in HALVES.get(name, ()):
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    if name == "IQ1_M":  # four bits of it in each of the last four words
        words = blocks[:, 48:56].copy().view("<u2")
        nibbles = (halves[:, None] >> np.array([0, 4, 8, 12])) & 15
        words[:] = (words & 0x0FFF) | (nibbles << 12).astype("<u2")
        blocks[:, 48:56] = words.view(np.uint8)


def random_blocks(name: str, count: int = BLOCKS) -> np.ndarray:
    """[count, bytes] of random bytes whose scales are finite, the first of them special."""
    random = np.random.default_rng(SEED)
    blocks = random.integers(0, 256, (count, TYPES[name]["bytes"]), np.uint8)
    halves = random.integers(0, 1 << 16, count).astype("<u2")
    halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000  # no exponent of infinity or NaN
    halves[: len(SPECIAL_HALVES)] = SPECIAL_HALVES[:count]
    put_halves(name, blocks, halves)
    return blocks


def random_numbers(name: str) -> np.ndarray:
    """Rows of a type without blocks: every 16-bit pattern that is finite, or as many fp32."""
    patterns = np.arange(1 << 16, dtype="<u4")
    if name == "F32":
        numbers = (patterns << 16 | patterns).view("<f4")
    else:
        bits = patterns.astype("<u2")
        numbers = bits.view("<f2") if name == "F16" else (patterns << 16).view("<f4")
        return bits[np.isfinite(numbers)].view(np.uint8)
    return numbers[np.isfinite(numbers)].view(np.uint8)


def decoded(name: str, data: np.ndarray, rows: int, dtype: str = "F32") -> np.ndarray:
    """Bits [rows, columns] of the numbers of contiguous blocks."""
    type_ = TYPES[name]
    columns = data.size // type_["bytes"] * type_["columns"] // rows
    bits = np.full((rows, columns), 0xAB, np.uint32 if dtype == "F32" else np.uint16)
    data = np.ascontiguousarray(data)
    ext.gguf_decode(type_["id"], data.ctypes.data, rows, columns, bits.ctypes.data, dtype)
    return bits


def by_gguf(name: str, data: np.ndarray) -> np.ndarray:
    """The same in fp32 by the package, flat."""
    with np.errstate(all="ignore"):
        return quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[name]).reshape(-1)


def sample(name: str) -> np.ndarray:
    return random_numbers(name) if TYPES[name]["columns"] == 1 else random_blocks(name)


def test_the_table_agrees_with_ggml_on_numbers_and_sizes():
    theirs = {type_.name: (int(type_), *gguf.GGML_QUANT_SIZES[type_]) for type_ in gguf.GGMLQuantizationType}
    for name, type_ in TYPES.items():
        assert (type_["id"], type_["columns"], type_["bytes"]) == theirs[name], name


def test_no_type_that_holds_weights_is_missing():
    activations_or_integers = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    theirs = {type_.name for type_ in gguf.GGMLQuantizationType} - activations_or_integers - {"Q1_0"}
    assert theirs == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks_are_the_numbers_of_the_package_bit_for_bit(name):
    data = sample(name)
    expected = by_gguf(name, data)
    bits = decoded(name, data, rows=1).reshape(-1)
    wrong = np.flatnonzero(bits != expected.view(np.uint32))
    first = wrong[:1]
    assert wrong.size == 0, (
        f"{name}, seed {SEED}: number {first} of {bits.size} is {bits[first].view(np.float32)}, "
        f"expected {expected[first]}; {wrong.size} differ"
    )
    assert np.count_nonzero(expected) > expected.size // 2  # the blocks were worth reading


@pytest.mark.parametrize("name", TYPES)
def test_numbers_are_rounded_once_to_bf16_and_fp16(name):
    data = sample(name)
    expected = by_gguf(name, data)
    with np.errstate(over="ignore"):
        halves = expected.astype(np.float16).view(np.uint16)
    assert np.array_equal(decoded(name, data, 1, "F16").reshape(-1), halves)
    bits = expected.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert np.array_equal(decoded(name, data, 1, "BF16").reshape(-1), nearest.astype(np.uint16))


@pytest.mark.parametrize("special", [0x7C00, 0xFC00, 0x7E00, 0xFE01], ids=["inf", "-inf", "nan", "-nan"])
@pytest.mark.parametrize("name", [*HALVES, "IQ1_M"])
def test_a_scale_that_is_not_finite_spoils_its_own_row_alone(name, special):
    """Numbers are then infinite or NaN, where IEEE says which; other rows keep their bits."""
    data = random_blocks(name, 48)
    clean = decoded(name, data, rows=3)
    halves = np.array([special], "<u2")
    put_halves(name, data[16:17], halves)
    spoilt = decoded(name, data, rows=3)
    assert np.array_equal(spoilt[[0, 2]], clean[[0, 2]])
    numbers = spoilt[1].view(np.float32)
    columns = TYPES[name]["columns"]
    assert not np.isfinite(numbers[:columns]).any()
    assert np.array_equal(spoilt[1, columns:], clean[1, columns:])
    with_theirs = by_gguf(name, data).reshape(3, -1)[1]
    assert np.array_equal(numbers, with_theirs, equal_nan=True)


def test_impossible_requests_are_one_sentence():
    data = np.zeros(64, np.uint8)
    target = np.zeros(256, np.float32)
    at, to = data.ctypes.data, target.ctypes.data
    with pytest.raises(ValueError, match="ggml type 36 is not known; expected one of 0, 1, 2"):
        ext.gguf_decode(36, at, 1, 32, to, "F32")
    with pytest.raises(
        ValueError, match="1 rows of 48 columns are no blocks of Q8_0; expected a multiple of 32"
    ):
        ext.gguf_decode(8, at, 1, 48, to, "F32")
    with pytest.raises(ValueError, match="numbers of dtype I8 were asked for; expected F32, BF16 or F16"):
        ext.gguf_decode(8, at, 1, 32, to, "I8")


def test_blocks_at_odd_addresses_and_nothing_read_or_written_beside_them():
    """Files promise no alignment. One block of MXFP4 by hand, in the middle of other bytes."""
    for offset in range(1, 5):
        data = np.full(64, 0xFF, np.uint8)
        data[offset : offset + 17] = np.frombuffer(struct.pack("B16B", 128, *range(16)), np.uint8)
        target = np.full(34, 7, np.float32)
        ext.gguf_decode(39, data.ctypes.data + offset, 1, 32, target.ctypes.data + 4, "F32")
        half = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
        assert target.tolist() == [7, *half, *[0] * 16, 7]
