"""Each AMX instruction against numpy, written from the definitions in Intel's manual.

Not collected by itself: test_amx_instructions.py runs this file in a process that has AMX or traps it.
"""

from __future__ import annotations

import ctypes
import os
import signal

import numpy as np
import pytest
import trapped_amx
from formats import from_bf16, random_bf16, to_bf16
from isolation import python

TRAPPED = bool(os.environ.get("KT_TEST_TRAPPED_AMX"))

PRODUCTS = {"bf16": 0, "s8s8": 1, "s8u8": 2, "u8s8": 3, "u8u8": 4}
BYTES = {"s": np.int8, "u": np.uint8}
TINY = np.float32(2.0**-126)  # the smallest normal number
SHAPES = [(16, 16, 16), (1, 16, 16), (16, 16, 1), (16, 1, 16), (3, 5, 7), (1, 1, 1)]


@pytest.fixture(scope="module")
def amx(tmp_path_factory) -> ctypes.CDLL:
    """The functions of instructions.cc, in a process that may use tiles."""
    assert trapped_amx.detected() >= trapped_amx.FEATURES
    library = tmp_path_factory.mktemp("amx") / "instructions.so"
    flags = ("-O2", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
    return ctypes.CDLL(str(trapped_amx.compiled(library, "instructions.cc", flags=flags)))


def configuration(*shapes: tuple[int, int], start_row: int = 0) -> np.ndarray:
    """64 bytes for tiles 0, 1, ... of (rows, bytes of a row)."""
    config = np.zeros(64, np.uint8)
    config[0], config[1] = 1, start_row
    for tile, (rows, row_bytes) in enumerate(shapes):
        config[16 + 2 * tile] = row_bytes
        config[48 + tile] = rows
    return config


def call(function, *arguments) -> None:
    function(*(a if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in arguments))


def stride(size: int) -> ctypes.c_int64:
    return ctypes.c_int64(size)


def in_tile_rows(matrix: np.ndarray) -> np.ndarray:
    """The bytes of its rows, 16 of 64 bytes; the rest is a pattern that no product may see."""
    stored = np.full((16, 64), 0xA5, np.uint8)
    rows = np.ascontiguousarray(matrix).view(np.uint8)
    stored[: rows.shape[0], : rows.shape[1]] = rows
    return stored


def product(amx, kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """C + A * B by the instruction: a [rows, K], b [K / p, columns * p], p elements of 32 bits together."""
    operands = [in_tile_rows(matrix) for matrix in (a, b, c)]
    call(amx.load_config, configuration(*(m.view(np.uint8).shape for m in (c, a, b))))
    call(amx.multiply, PRODUCTS[kind], *operands)
    amx.release()
    stored = operands[2]
    rows, row_bytes = c.shape[0], 4 * c.shape[1]
    assert (stored[rows:] == 0xA5).all(), "TILESTORED wrote beyond the rows of the tile"
    assert (stored[:, row_bytes:] == 0xA5).all(), "TILESTORED wrote beyond the columns of the tile"
    return np.ascontiguousarray(stored[:rows, :row_bytes]).view(c.dtype)


# ---- bytes --------------------------------------------------------------------------------------


def sums_of_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    quads = b.reshape(len(b), -1, 4)  # [K / 4, columns, 4]
    rows = a.reshape(len(a), -1, 4)
    return (c + np.einsum("mki,kni->mn", rows.astype(np.int64), quads.astype(np.int64))).astype(np.int32)


@pytest.mark.parametrize("kind", [kind for kind in PRODUCTS if kind != "bf16"])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_products_of_bytes(amx, kind, rows, columns, depth):
    rng = np.random.default_rng(1)
    first, second = BYTES[kind[0]], BYTES[kind[2]]
    a = rng.integers(0, 256, (rows, 4 * depth), dtype=np.uint8).view(first)
    b = rng.integers(0, 256, (depth, 4 * columns), dtype=np.uint8).view(second)
    c = rng.integers(-(2**31), 2**31, (rows, columns), dtype=np.int64).astype(np.int32)
    assert (product(amx, kind, a, b, c) == sums_of_bytes(a, b, c)).all()


@pytest.mark.parametrize("value", [-128, -127, 127])
def test_extreme_bytes_do_not_saturate(amx, value):
    a = np.full((16, 64), value, np.int8)
    b = np.full((16, 64), -128, np.int8)
    c = np.full((16, 16), -(2**31), np.int32)
    assert (product(amx, "s8s8", a, b, c) == sums_of_bytes(a, b, c)).all()
    a = np.full((16, 64), 255, np.uint8)
    assert (product(amx, "u8u8", a, a, c) == sums_of_bytes(a, a, c)).all()


def test_all_eight_tiles_are_different_ones(amx):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-128, 128, (16, 64), dtype=np.int64).astype(np.int8) for _ in range(2))
    c = np.zeros((16, 16), np.int32)
    call(amx.load_config, configuration(*[(16, 64)] * 8))
    call(amx.multiply_high_tiles, a, b, c)
    amx.release()
    assert (c == sums_of_bytes(a, b, np.zeros((16, 16), np.int32))).all()


# ---- bf16 ---------------------------------------------------------------------------------------


def flushed(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values).astype(np.float32)


def sums_of_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """First and second of each pair are summed apart, then added up, then added to C.

    The fused multiply-add is exact in float64 before it is rounded, as long as exponents differ little.
    """
    pairs = flushed(from_bf16(b)).reshape(len(b), -1, 2).astype(np.float64)
    left = flushed(from_bf16(a)).astype(np.float64)
    sums = np.zeros((2, len(a), b.shape[1] // 2), np.float32)
    for k in range(a.shape[1] // 2):
        for half in (0, 1):
            exact = sums[half] + left[:, 2 * k + half, None] * pairs[k, :, half]
            sums[half] = flushed(exact.astype(np.float32))
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_products_of_bf16(amx, rows, columns, depth):
    rng = np.random.default_rng(3)
    a, b = random_bf16(rng, rows, 2 * depth), random_bf16(rng, depth, 2 * columns)
    c = rng.standard_normal((rows, columns), dtype=np.float32)
    actual = product(amx, "bf16", a, b, c)
    assert (actual.view(np.uint32) == sums_of_bf16(a, b, c).view(np.uint32)).all()


def test_denormals_of_bf16_are_zero_before_and_after(amx):
    denormal, smallest, one = to_bf16(np.array([TINY / 2, TINY, 1], np.float32))
    half, tiny_minus = to_bf16(np.array([0.5, -TINY * 1.5], np.float32))
    a = np.array([[denormal, one], [smallest, half], [smallest, one]], np.uint16)
    b = np.array([[one, denormal, half, smallest, smallest, tiny_minus]], np.uint16)
    c = np.array([[TINY / 4, 0, -TINY / 4], [0, TINY, 1], [TINY, -TINY / 2, 0]], np.float32)
    actual = product(amx, "bf16", a, b, c)
    assert (actual.view(np.uint32) == sums_of_bf16(a, b, c).view(np.uint32)).all()
    assert actual[0, 0] == 0 and actual[2, 1] == TINY and actual[2, 2] == -1.5 * TINY  # by hand


def test_infinities_and_nan_of_bf16(amx):
    a = to_bf16(np.array([[np.inf, 1], [np.nan, 1], [1, 1]], np.float32))
    b = to_bf16(np.array([[1, 1, 0, 1], [2, 2, 2, 2]], np.float32)[:1])
    actual = product(amx, "bf16", a, b, np.zeros((3, 2), np.float32))
    assert actual[0, 0] == np.inf and np.isnan(actual[0, 1])
    assert np.isnan(actual[1]).all() and (actual[2] == (2, 1)).all()


# ---- memory and configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", ["load_store", "stream_load_store", "load_store_scaled", "load_store_far"]
)
@pytest.mark.parametrize(("from_stride", "to_stride"), [(64, 64), (256, 72), (-128, 200)])
def test_rows_in_memory(amx, function, from_stride, to_stride):
    rng = np.random.default_rng(4)
    memory = rng.integers(0, 256, 16 * 256, dtype=np.uint8)
    target = np.zeros(16 * 256, np.uint8)
    shapes = [(11, 20)] * 8
    first = 15 * 128 if from_stride < 0 else 0
    call(amx.load_config, configuration(*shapes))
    getattr(amx, function)(
        ctypes.c_void_p(memory.ctypes.data + first),
        stride(from_stride),
        ctypes.c_void_p(target.ctypes.data),
        stride(to_stride),
    )
    amx.release()
    expected = np.zeros_like(target)
    for row in range(11):
        start = first + row * from_stride
        expected[row * to_stride : row * to_stride + 20] = memory[start : start + 20]
    assert (target == expected).all()


def test_load_without_an_index_repeats_its_row(amx):
    memory = np.random.default_rng(5).integers(0, 256, 64, dtype=np.uint8)
    target = np.zeros((16, 64), np.uint8)
    call(amx.load_config, configuration(*[(16, 64)] * 8))
    amx.load_store_one_row(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_void_p(target.ctypes.data), stride(64)
    )
    amx.release()
    assert (target == memory).all()


def test_zeroed_tile(amx):
    memory, target = np.full((16, 64), 7, np.uint8), np.full((16, 64), 9, np.uint8)
    call(amx.load_config, configuration((5, 24)))
    call(amx.load_zero_store, memory, target)
    amx.release()
    assert (target[:5, :24] == 0).all() and (target[5:] == 9).all() and (target[:, 24:] == 9).all()


def test_load_starts_at_the_start_row(amx):
    memory = np.random.default_rng(6).integers(1, 256, (16, 64), dtype=np.uint8)
    target = np.full((16, 64), 9, np.uint8)
    call(amx.load_config, configuration((16, 64), start_row=3))
    call(amx.load_store, memory, stride(64).value, target, stride(64).value)
    amx.release()
    assert (target[:3] == 0).all() and (target[3:] == memory[3:]).all()


@pytest.mark.parametrize("function", ["copy_config_near_the_code", "copy_config_indexed"])
def test_configuration_is_read_and_written(amx, function):
    config = configuration((1, 4), (2, 8), (16, 64), (3, 60))
    copy = np.full(64, 0xA5, np.uint8)
    call(getattr(amx, function), config, copy)
    assert (copy == config).all()
    amx.release()
    call(amx.store_config, copy)
    assert not copy.any()


# ---- what the CPU refuses -----------------------------------------------------------------------

REFUSED = """
import sys
from amx_instructions import *
amx = ctypes.CDLL(sys.argv[1])
call(amx.load_config, configuration(*eval(sys.argv[2])))
call(getattr(amx, sys.argv[3]), *eval(sys.argv[4]))
"""
ZEROS = ", ".join(["np.zeros((16, 64), np.uint8)"] * 3)


@pytest.mark.parametrize(
    ("shapes", "function", "arguments", "why"),
    [
        ("[]", "multiply", f"(1, {ZEROS})", "the tile has no shape"),
        ("[(8, 64), (7, 64), (16, 64)]", "multiply", f"(1, {ZEROS})", "differ in rows"),
        ("[(8, 64), (8, 64), (16, 60)]", "multiply", f"(1, {ZEROS})", "differ in bytes of a row"),
        ("[(8, 64), (8, 64), (15, 64)]", "multiply", f"(0, {ZEROS})", "columns are not the second's rows"),
        ("[(16, 64)] * 8", "multiply_with_itself", "()", "a tile is named twice"),
        ("[(16, 68)]", "release", "()", "more than 16 rows of 64 bytes"),
    ],
)
def test_what_the_cpu_refuses_ends_the_process(amx, shapes, function, arguments, why):
    done = python("-c", REFUSED, amx._name, shapes, function, arguments)
    assert done.returncode in (-signal.SIGILL, -signal.SIGSEGV), done.stdout
    if TRAPPED:
        assert why in done.stdout
