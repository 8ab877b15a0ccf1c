"""Risk: a number of a GGUF file is packed, decoded or multiplied as another.

The types that layers keep as panels of integers, against what the gguf package reads in the same blocks: the
slow twin, what is written back, every number as the kernels see it, exact sums of whole numbers, the error on
random ones, and the bits for any neighbours, threads and instruction sets. The tests of all methods
(test_integer_sums.py and others) cover the loops around; types, shapes and token counts are samples.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from formats import F32, SMALL_SWEEP, SWEEP, to_bf16
from gguf_blocks import PANEL_TYPES, GgufFormat, GgufMatrix, exact_q8_0
from harness import (
    Call,
    Experts,
    arguments,
    build_layer,
    ext,
    make_layer,
    nmse,
    poisoned,
    random_call,
    random_experts,
    reference,
    run,
    same_bits,
)
from integers import peaked_states
from test_integer_sums import HALF, TOKENS, assert_sums, extreme_states

ENGINE = ext.Engine(2)
PARTS = ("gate", "up", "down")
FORMATS = [GgufFormat(type) for type in PANEL_TYPES]
# gate, up and down of real files; up may differ from gate.
MIXED = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q2_K", "Q2_K", "Q3_K"),
    ("IQ4_XS", "Q5_K", "Q5_0"),
    ("Q8_0", "MXFP4", "Q4_1"),
]
NMSE_BOUND = 2e-4


def mixed_experts(seed: int, count: int, hidden: int, intermediate: int, types: tuple[str, ...]) -> Experts:
    rng = np.random.default_rng(seed)
    gate, up, down = map(GgufFormat, types)
    return Experts(
        gate.random_matrix(rng, count, intermediate, hidden),
        up.random_matrix(rng, count, intermediate, hidden),
        down.random_matrix(rng, count, hidden, intermediate),
    )


def sizes(format: GgufFormat) -> tuple[tuple[int, int], ...]:
    """(hidden, intermediate) with K that ends within steps and blocks of K, where the type allows that."""
    if format.block.columns == 32:
        return ((96, 64), (352, 160)) if SMALL_SWEEP else ((96, 64), (352, 160), (64, 1440))
    return ((256, 256),) if SMALL_SWEEP else ((256, 512), (768, 256))


# ---- the slow twin and writing back -------------------------------------------------------------

once = pytest.mark.skipif(SWEEP != "all", reason="the same on every instruction set")


@once
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_twin_reads_every_number_as_the_gguf_package_does(format):
    hidden, intermediate = sizes(format)[0]
    experts = random_experts(5, 3, hidden, intermediate, format)
    call = random_call(5, experts, 4, top_k=2)
    output = poisoned(call.hidden.shape, F32)
    build_layer(ext.Engine(2, 2), experts, swiglu_limit=1.0).forward_reference(*arguments(call, output, F32))
    # Both sum in double, but gguf's numbers with a minimum are rounded to fp32.
    assert nmse(output, reference(experts, call, limit=1.0)) < 1e-13


@once
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_written_back_is_every_number_rounded_once_to_bf16(format, ranks):
    hidden, intermediate = format.fit(96), 2 * format.fit(32)
    experts = random_experts(6, 3, hidden, intermediate, format)
    layer = build_layer(ENGINE, experts)
    share = intermediate // ranks
    w13 = [np.zeros((2 * share, hidden), np.uint16) for _ in range(ranks)]
    w2 = [np.zeros((hidden, share), np.uint16) for _ in range(ranks)]
    pointers = ([array.ctypes.data for array in arrays] for arrays in (w13, w2))
    w13_at, w2_at = pointers
    layer.write_expert(1, ranks, w13_at, [0] * ranks, w2_at, [0] * ranks)
    gate, up, down = (to_bf16(part.numbers(1)) for part in experts.parts)
    for rank in range(ranks):
        rows = slice(rank * share, (rank + 1) * share)
        assert same_bits(w13[rank], np.concatenate([gate[rows], up[rows]]))
        assert same_bits(w2[rank], np.ascontiguousarray(down[:, rows]))


@once
def test_blocks_that_no_file_can_have_are_refused():
    experts = random_experts(4, 2, 64, 64, GgufFormat("MXFP4"))
    names = ["Q8_0", "Q8_0", "Q4_K"]
    layer = make_layer(ENGINE, experts)
    with pytest.raises(ValueError, match=r"Q4_K: a matrix \[64, 64\] does not divide into blocks of 256"):
        layer.load_experts(*(part.pointers() for part in experts.parts), formats=names)
    experts.up.weight[1, 3, 17] = 255  # the second block's power of two
    with pytest.raises(ValueError, match=r"expert 1, up: .* 255, which is not a number"):
        build_layer(ENGINE, experts)


# ---- numbers and sums ---------------------------------------------------------------------------


def as_kernels_see_it(matrix: GgufMatrix) -> np.ndarray:
    """float64 [rows, columns] of expert 0, as down: token t has h = 64 in place t and nothing else."""
    size = matrix.columns
    identity, zeros = np.eye(size)[None] * 128, np.zeros((1, size, size))
    experts = Experts(exact_q8_0(identity), exact_q8_0(zeros), matrix)
    layer = build_layer(ENGINE, experts, top_k=1, swiglu_alpha=HALF)
    states = to_bf16(np.eye(size, dtype=np.float32))
    call = Call(states, np.zeros((size, 1), np.int64), np.ones((size, 1), np.float32))
    together = run(layer, call)
    for t in range(0, size, 29):
        assert same_bits(run(layer, call.rows([t])), together[[t]]), f"token {t} alone"
    return together.T.astype(np.float64) / 64


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_number_has_its_own_code_scale_and_minimum(format):
    size = format.fit(224)
    matrix = format.random_matrix(np.random.default_rng(2), 1, size, size)
    expected = matrix.decoded(0)
    # Scale and minimum may be as large as the largest number of the block, and cancel each other.
    blocks = np.abs(expected).reshape(size, -1, format.block.columns).max(axis=-1)
    bound = 2.0**-20 * blocks.repeat(format.block.columns, axis=-1)
    wrong = np.argwhere(np.abs(as_kernels_see_it(matrix) - expected) > bound)
    assert len(wrong) == 0, f"{len(wrong)} numbers are wrong, the first at [row, column] = {wrong[0]}"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_sums_of_whole_numbers_are_exact(format, part):
    hidden, intermediate = sizes(format)[1 % len(sizes(format))]
    rng = np.random.default_rng(hidden + intermediate)
    rows, columns = (hidden, intermediate) if part == "down" else (intermediate, hidden)
    matrix = format.integer_matrix(rng, 4, rows, columns)
    assert_sums(part, matrix, peaked_states(rng, max(TOKENS), hidden, largest=15), seed=1, alone=3)


LARGEST = {"Q4_0": 0x00, "Q5_0": 0x00, "Q6_K": 0x00, "Q3_K": 0x00, "Q5_1": 0xFF, "Q2_K": 0xFF, "IQ4_NL": 0x00}


@pytest.mark.parametrize("type", LARGEST)
def test_the_largest_codes_and_activations(type):
    """Sums of products in 16 bits, where instruction sets have them, neither saturate nor wrap around."""
    format = GgufFormat(type)
    hidden, intermediate = format.fit(64), format.fit(64)
    rng = np.random.default_rng(7)
    matrix = format.integer_matrix(rng, 4, hidden, intermediate)
    kind = format.block
    blocks = matrix.weight.reshape(4, hidden, -1, kind.bytes)
    halves = {at + i for at in (kind.scale, kind.minimum) if at is not None for i in (0, 1)}
    scales = {"Q6_K": range(192, 208), "Q3_K": range(96, 108), "Q2_K": range(16)}.get(type, ())
    for at in {*range(kind.bytes)} - halves - {*scales}:
        blocks[:, ::2, :, at] = LARGEST[type]
    states = extreme_states(rng, max(TOKENS), hidden)
    assert_sums("down", matrix, states, seed=2, alone=3)


# ---- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_against_double_sums(format):
    for hidden, intermediate in sizes(format):
        experts = random_experts(hidden * 8191 + intermediate, 3, hidden, intermediate, format)
        call = random_call(1, experts, 90, top_k=2)
        expected = reference(experts, call)
        layer = build_layer(ENGINE, experts)
        for tokens in (1, 3, 12, 90):
            bound = NMSE_BOUND if tokens > 60 else 2 * NMSE_BOUND
            error = nmse(run(layer, call.rows(slice(tokens))), expected[:tokens])
            assert error <= bound, f"{hidden}x{intermediate}, {tokens} tokens: NMSE {error:.2e}"


@pytest.mark.parametrize("types", MIXED, ids="-".join)
def test_each_matrix_may_have_its_own_type(types):
    experts = mixed_experts(3, 4, 512, 256, types)
    call = random_call(3, experts, 70, top_k=2)
    layer = build_layer(ENGINE, experts)
    assert nmse(run(layer, call), reference(experts, call)) <= NMSE_BOUND


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_token_has_the_same_bits_whatever_its_neighbours_and_threads(format):
    hidden, intermediate = sizes(format)[-1]
    experts = random_experts(hidden + intermediate, 3, hidden, intermediate, format)
    call = random_call(hidden, experts, 40, top_k=2)
    together = run(build_layer(ENGINE, experts), call)
    other = build_layer(ext.Engine(3, 2), experts)
    assert same_bits(run(other, call), together)
    for first, count in ((0, 1), (7, 2), (11, 4), (17, 13)):
        rows = [*range(first, first + count)]
        assert same_bits(run(other, call.rows(rows)), together[rows]), f"tokens {rows}"


def digests() -> list[str]:
    """A line for the bits of each type's results (test_every_cpu_variant.py compares them)."""
    lines = []
    for types in [*[(type,) * 3 for type in PANEL_TYPES], *MIXED]:
        experts = mixed_experts(1, 3, 256, 256, types)
        layer = build_layer(ENGINE, experts)
        call = random_call(1, experts, 21, top_k=2)
        for tokens in (1, 2, 21):
            output = run(layer, call.rows(slice(tokens)))
            lines.append(f"{'-'.join(types)} {tokens} {hashlib.sha256(output.tobytes()).hexdigest()}")
    return lines
