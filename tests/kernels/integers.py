"""Layers whose results are whole numbers, so that every kernel of every format must give exactly the right
answer.

    x     0 or 1
    gate  a few 64s and 128s per row, else 0    g = 64 n, 0 <= n <= 3
    up    -1, 0 or 1, sparse                    |u| <= 85
    h     silu(g) u = 64 n u
    down  -1/64, 0 or 1/64                      y = sum of +- n u
    weights of the experts: 1, -1, 2, 0.5       output = a multiple of 1/2

Why this is exact in any order of summation: silu(0) = 0; for g >= 64 the quotient g / (1 + exp(-g)) is g, in
fp32 and in double (exp(-64) = 1.6e-28); h has at most 8 significant bits (n u <= 255), so it survives
rounding to bf16; and all partial sums are small multiples of one power of two, far below 2^24 of them.

A format with scales gets the same numbers: random powers of two as scales, and codes that make up for them.

Int8 activations are rounded by the step of at most 128 columns, to multiples of 1/127 of the step's largest.
So their layers have other numbers, which survive that: every 16 columns hold one of 127 times a power of two.

    x     -127 .. 127, one of +-127 in every 16 columns (see peak), 1, 2 or 0 times that for 128 columns;
          x[0] = 64, x[1] = 1
    gate  64 or 128 everywhere: a 1 or a 2 in column 0, the same in every row of 128
    up    +-x, 16 columns moved together to 16 rows, from the peak on; for 128 rows from the same 128 columns
    h     64 times that, or 128 times
"""

from __future__ import annotations

import numpy as np
from formats import PLAIN, TABLES, Format, Matrix, finite_codes, to_bf16
from gguf_blocks import GgufFormat, exact_q8_0
from harness import Call, Experts, mixed_ids

HOLDS_64, HOLDS_1 = 0, 1  # columns of x with int8 activations
STEP = 128  # columns: at least those that share a scale of int8 activations
ROUTING_WEIGHTS = np.array([1, -1, 2, 0.5], np.float32)
MAX_UP = 85  # n u <= 255
_UP_ENTRIES = 250  # non-zeros of an up row, at most: |u| is then about sqrt(125), MAX_UP lies 7 sigma out


def _signs(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """int8: -1 or 1 with probability density/2 each, else 0."""
    draws = rng.integers(0, 256, shape, dtype=np.uint8)
    half = max(1, round(density * 128))
    return (draws < half).astype(np.int8) - (draws >= 256 - half).astype(np.int8)


def exact_matrix(
    rng: np.random.Generator, format: Format, values: np.ndarray, exponents: tuple[int, ...]
) -> Matrix:
    """`values` [E, rows, columns] in a format, exactly: scales are random powers of two with these exponents
    and the codes make up for them. NVFP4 hides a power of two of its own in the factor. GGUF types: as Q8_0.
    """
    if format.codes == "bf16":
        return format.matrix(to_bf16(values))
    if isinstance(format, GgufFormat):
        return exact_q8_0(values)
    count, rows, columns = values.shape
    scales = np.exp2(rng.choice(exponents, (count, *format.scales_shape(rows, columns))))
    spread = scales.repeat(format.block_rows, axis=1)[:, :rows]
    spread = spread.repeat(format.group_columns(columns), axis=2)[:, :, :columns]
    codes = _codes_of(format.codes, values / spread)
    factors = np.ones(count, np.float32)
    if format.scale_kind == "e4m3":
        factors = np.exp2(rng.integers(-4, 5, count) + np.float32(exponents[0])).astype(np.float32)
        scales /= factors[:, None, None]
    return format.matrix(codes, format.stored_scales(scales), factors)


def _codes_of(kind: str, values: np.ndarray) -> np.ndarray:
    """The code of each value; every value must be in the table."""
    codes = finite_codes(kind)
    ascending = codes[np.argsort(TABLES[kind][codes], kind="stable")]
    found = np.searchsorted(TABLES[kind][ascending], values.astype(np.float32))
    result = ascending[found]
    assert np.array_equal(TABLES[kind][result], values)
    return result


def integer_experts(seed: int, count: int, hidden: int, intermediate: int, format: Format = PLAIN) -> Experts:
    """Sizes that the format cannot have as a number of columns are rounded up."""
    rng = np.random.default_rng(seed)
    hidden, intermediate = format.fit(hidden), format.fit(intermediate)
    down = _signs(rng, (count, hidden, intermediate), min(1.0, 500 / intermediate)).astype(np.float32) / 64
    down = exact_matrix(rng, format, down, (-8, -7, -6))
    if format.activations == "int8":
        return Experts(*moved_states(rng, count, hidden, intermediate, format), down)
    gate = np.zeros((count, intermediate, hidden), np.float32)
    expert, row = np.ogrid[:count, :intermediate]
    for value in (64.0, 128.0):
        gate[expert, row, rng.integers(0, hidden, (count, intermediate))] = value
    up = _signs(rng, (count, intermediate, hidden), min(1.0, _UP_ENTRIES / hidden)).astype(np.float32)
    return Experts(exact_matrix(rng, format, gate, (5, 6)), exact_matrix(rng, format, up, (-2, -1, 0)), down)


def integer_call(seed: int, experts: Experts, tokens: int, top_k: int) -> Call:
    rng = np.random.default_rng(seed)
    if experts.format.activations == "int8":
        hidden = peaked_states(rng, tokens, experts.hidden)
    else:
        hidden = rng.integers(0, 2, (tokens, experts.hidden))
    return Call(
        to_bf16(hidden.astype(np.float32)),
        mixed_ids(rng, tokens, top_k, experts.count),
        rng.choice(ROUTING_WEIGHTS, (tokens, top_k)),
    )


# ---- with int8 activations ----------------------------------------------------------------------


def peak(columns: int, sixteen: int) -> int:
    """The column of +-127 among columns 16 * sixteen .. of a row of so many."""
    return min(16 * sixteen + 2 + (7 * sixteen + 3) % 14, columns - 1)


def peaked_states(rng: np.random.Generator, tokens: int, columns: int, largest: int = 127) -> np.ndarray:
    """Hidden states [tokens, columns], whole numbers of at most `largest` between the peaks."""
    assert columns >= 3
    states = rng.integers(-largest, largest + 1, (tokens, columns))
    peaks = [peak(columns, b) for b in range(-(-columns // 16))]
    states[:, peaks] = rng.choice([-127, 127], (tokens, len(peaks)))
    for first in range(STEP, columns, STEP):
        states[:, first : first + STEP] *= rng.choice([0, 1, 1, 2, 2], (tokens, 1))
    states[:, HOLDS_64], states[:, HOLDS_1] = 64, 1
    return states


def moved_states(
    rng: np.random.Generator, count: int, hidden: int, intermediate: int, format: Format
) -> tuple[Matrix, Matrix]:
    """gate and up with which SwiGLU gives the hidden states, moved and times a power of two."""
    assert hidden >= 16
    steps = -(-intermediate // STEP)
    gate = np.zeros((count, intermediate, hidden), np.float32)
    gate[:, :, HOLDS_64] = rng.choice([1, 2], (count, steps)).repeat(STEP, axis=1)[:, :intermediate]
    up = np.zeros((count, intermediate, hidden), np.float32)
    for expert in range(count):
        step = 0
        for first in range(0, intermediate, 16):
            rows = np.arange(first, min(first + 16, intermediate))
            if first % STEP == 0:
                step = rng.integers(0, -(-(hidden // 16 * 16) // STEP)) * STEP // 16
            source = rng.integers(step, min(step + STEP // 16, hidden // 16))
            columns = 16 * source + (peak(hidden, source) + rows - first) % 16
            up[expert, rows, columns] = rng.choice([-1, 1], len(rows))
    return exact_matrix(rng, format, gate, (-1, 0)), exact_matrix(rng, format, up, (-2, -1, 0))
