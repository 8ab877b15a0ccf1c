"""Risk: with int8 activations a sum of products of bytes saturates, wraps around, loses a product or a sign.

One matrix at a time holds random codes, or those of the largest magnitude, and its products are compared with
sums in double, which hold these numbers exactly. Hidden states are whole numbers that int8 holds
(integers.py), and nothing is rounded between the matrix and the output:

    down   gate and up move and scale hidden states
    up     gate lets one row of 32 pass, so that its step of SwiGLU's outputs has a scale of its own; down
           takes each of these to an output
    gate   the same, "swigluoai" with a vanishing alpha: SwiGLU is gate / 2 * (up + 1); an up of -1 stops rows

The scale of a step that is one number u is u / 127, which fp32 rounds, and so is their product: a relative
error of 2^-23, less than half the unit of which all results are multiples.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import ONE_PER_PATH, PATHS, SMALL_SWEEP, TABLES, Format, Matrix, finite_codes, to_bf16
from harness import Call, Experts, build_layer, ext, reference, run, same_bits
from integers import HOLDS_1, HOLDS_64, exact_matrix, moved_states, peaked_states

ENGINE = ext.Engine(2)
PARTS = ("gate", "up", "down")
HALF = 1e-37  # as swiglu_alpha: sigmoid(HALF * gate) is 1/2 in fp32
ONE_OF = 32  # rows of gate and up of which one passes
EXPERTS = 4
SWIGLU = {"gate": 0.5, "up": 64.0, "down": 64.0}  # what it multiplies by
SMALLEST_SCALE, SMALLEST_EXPONENT = 0.5, -1
# Few tokens of an expert and many, and tiles of tokens that are not full.
TOKENS = (1, 2, 7, 24, 90)
# (hidden, intermediate): ragged in rows and columns; several blocks of K.
SIZES = ((96, 64), (83, 150), (1100, 330))
if SMALL_SWEEP:
    TOKENS, SIZES = (1, 14), ((83, 150),)


def random_codes(rng: np.random.Generator, format: Format, rows: int, columns: int) -> Matrix:
    """All codes, under scales that are powers of two."""
    codes = rng.choice(finite_codes(format.codes), (EXPERTS, rows, columns))
    scales = np.exp2(rng.choice([0, SMALLEST_EXPONENT], (EXPERTS, *format.scales_shape(rows, columns))))
    return format.matrix(codes, format.stored_scales(scales))


def extreme_codes(rng: np.random.Generator, format: Format, rows: int, columns: int) -> Matrix:
    """In each row codes of the largest magnitude: all of one sign, changing signs, or random ones."""
    values = TABLES[format.codes]
    lowest, highest = values.argmin(), values.argmax()
    positive = rng.random((EXPERTS, rows, columns)) < 0.5
    positive[:, 0::4], positive[:, 1::4] = True, False
    positive[:, 2::4] = np.arange(columns) % 2
    codes = np.where(positive, highest, lowest).astype(np.uint8)
    return format.matrix(codes, format.stored_scales(np.ones((EXPERTS, *format.scales_shape(rows, columns)))))


def extreme_states(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """-127 and 127, but for the first columns: of one sign, changing signs as in extreme_codes, random."""
    states = rng.choice([-127, 127], (tokens, columns))
    states[0::4], states[1::4] = 127, -127
    states[2::4] = np.where(np.arange(columns) % 2, 127, -127)
    states[:, HOLDS_64], states[:, HOLDS_1] = 64, 1
    return states


def gates(rng: np.random.Generator, format: Format, hidden: int, intermediate: int) -> tuple[np.ndarray, ...]:
    """(passing [experts, intermediate], down [experts, hidden, intermediate]) of the parts gate and up."""
    passing = np.zeros((EXPERTS, intermediate), bool)
    down = np.zeros((EXPERTS, hidden, intermediate), np.float32)
    for expert in range(EXPERTS):
        firsts = np.arange(0, intermediate, ONE_OF)
        rows = firsts + rng.integers(0, np.minimum(ONE_OF, intermediate - firsts))
        passing[expert, rows] = True
        down[expert, rng.permutation(hidden)[: len(rows)], rows] = 1
    return passing, down


def around(rng: np.random.Generator, part: str, matrix: Matrix) -> Experts:
    """Experts with this matrix as gate, up or down."""
    format = matrix.format
    if part == "down":
        gate, up = moved_states(rng, EXPERTS, hidden=matrix.rows, intermediate=matrix.columns, format=format)
        return Experts(gate, up, matrix)
    passing, down = gates(rng, format, hidden=matrix.columns, intermediate=matrix.rows)
    other = np.zeros((EXPERTS, matrix.rows, matrix.columns), np.float32)
    if part == "up":
        other[:, :, HOLDS_64] = passing
        gate, up = exact_matrix(rng, format, other, (-1, 0)), matrix
    else:
        other[:, :, HOLDS_1] = -1.0 * ~passing
        gate, up = matrix, exact_matrix(rng, format, other, (-1, 0))
    return Experts(gate, up, exact_matrix(rng, format, down, (-1, 0)))


def assert_sums(part: str, matrix: Matrix, states: np.ndarray, seed: int, alone: int) -> None:
    """Every result for every number of tokens in TOKENS, and `alone` tokens by themselves."""
    experts = around(np.random.default_rng(seed), part, matrix)
    alpha = HALF if part == "gate" else 0.0
    ids = np.arange(len(states))[:, None] % EXPERTS
    call = Call(to_bf16(states.astype(np.float32)), ids, np.ones((len(states), 1), np.float32))
    expected = reference(experts, call, alpha=alpha)
    unit = SMALLEST_SCALE * (0.5 if matrix.format.codes == "e2m1" else 1) * SWIGLU[part]
    assert np.array_equal(np.round(expected / unit) * unit, expected)
    assert np.count_nonzero(expected) > 0
    assert part == "down" or np.abs(expected).max() < unit * (1 << 22)
    layer = build_layer(ENGINE, experts, top_k=1, swiglu_alpha=alpha)
    for tokens in TOKENS:
        output = run(layer, call.rows(slice(tokens))).astype(np.float64)
        rounded = output if part == "down" else np.round(output / unit) * unit
        wrong = np.argwhere(rounded != expected[:tokens])
        assert wrong.size == 0, (
            f"{len(wrong)} of {output.size} sums are wrong, the first at [token, column] = {wrong[0]}: "
            f"{output[tuple(wrong[0])]} instead of {expected[tuple(wrong[0])]}"
        )
    together = run(layer, call)
    for t in range(alone):
        assert same_bits(run(layer, call.rows([t])), together[[t]]), f"token {t} alone"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
@pytest.mark.parametrize("format", [f for f in ONE_PER_PATH if f.activations == "int8"], ids=str)
def test_random_codes(format, hidden, intermediate, part):
    hidden, intermediate = format.fit(hidden), format.fit(intermediate)
    rng = np.random.default_rng(hidden + intermediate)
    rows, columns = (hidden, intermediate) if part == "down" else (intermediate, hidden)
    # Long sums of bytes stay below 2^24 units.
    largest = 127 if format.codes != "int8" or columns < 200 else 15
    states = peaked_states(rng, max(TOKENS), hidden, largest)
    assert_sums(part, random_codes(rng, format, rows, columns), states, seed=1, alone=6)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("format", [f for f in PATHS if f.activations == "int8" and f.group <= 128], ids=str)
def test_the_largest_codes_and_activations(format, part):
    hidden, intermediate = format.fit(90), format.fit(160 if part == "down" else 64)
    rng = np.random.default_rng(7)
    rows, columns = (hidden, intermediate) if part == "down" else (intermediate, hidden)
    states = extreme_states(rng, max(TOKENS), hidden)
    assert_sums(part, extreme_codes(rng, format, rows, columns), states, seed=2, alone=5)
