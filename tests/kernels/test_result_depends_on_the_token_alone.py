"""Risk: a token gets other bits with other neighbours, threads, pools, or earlier calls.

All comparisons are of bits, on random data, where any other order of summation would show.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import BF16, F32, FORMATS, ONE_PER_PATH, PATHS, PLAIN, Format, decode
from harness import (
    SMALL_SWEEP,
    Experts,
    arguments,
    build_layer,
    ext,
    poisoned,
    random_call,
    random_experts,
    run,
    same_bits,
)

ENGINE = ext.Engine(2)
# (hidden, intermediate, tokens): one long enough to be cut in K, sizes that fill nothing, fewer panels than
# pools.
CASES = [(2048, 768, 300), (64, 576, 65), (577, 191, 33), (33, 33, 40), (1, 1, 5)]
# The other methods decode weights twice: in registers for up to 4 tokens of an expert, else into blocks of K
# that are shared. Both K longer than a block and not a multiple of it; the second fills nothing.
METHOD_CASES = [(1400, 650, 70), (33, 33, 40)]
SCALE_CASES = [(1400, 650, 24)]
CROWD = (2048, 64, 700)
METHOD_CROWD = (1400, 64, 560)
SUBNORMAL_E4M3 = np.array([*range(8), *range(128, 136)], np.uint8)
if SMALL_SWEEP:
    CASES, CROWD = [(192, 96, 33), (33, 70, 18)], (768, 32, 200)
    METHOD_CASES, SCALE_CASES, METHOD_CROWD = [(600, 70, 18)], [(330, 70, 12)], (600, 32, 30)


def every_case(formats: tuple[Format, ...]) -> list:
    """Parameters (format, hidden, intermediate, tokens)."""
    return [
        pytest.param(format, *case, id="-".join(map(str, (format, *case))))
        for format in formats
        for case in (CASES if format == PLAIN else METHOD_CASES if format in ONE_PER_PATH else SCALE_CASES)
    ]


def make(hidden: int, intermediate: int, tokens: int, format: Format = PLAIN):
    experts = random_experts(hidden + intermediate, 4, hidden, intermediate, format)
    return experts, random_call(hidden, experts, tokens, top_k=2)


def some(tokens: int) -> list[int]:
    """A dozen places of a batch: its ends, around tile edges, and some between."""
    return sorted({t for t in (0, 1, 2, 11, 12, 15, 16, 31, 32, 63, 100, 255, 256, tokens - 1) if t < tokens})


@pytest.mark.parametrize(("format", "hidden", "intermediate", "tokens"), every_case(PATHS))
def test_token_result_does_not_depend_on_its_neighbours(format, hidden, intermediate, tokens):
    experts, call = make(hidden, intermediate, tokens, format)
    layer = build_layer(ENGINE, experts)
    together = run(layer, call)
    for t in some(tokens):
        assert same_bits(run(layer, call.rows([t])), together[[t]]), f"token {t} alone"
    for first, last in ((0, 2), (1, 4), (3, 20), (2, tokens)):
        assert same_bits(run(layer, call.rows(slice(first, last))), together[first:last]), (
            f"[{first}, {last})"
        )
    shuffled = np.random.default_rng(0).permutation(tokens)
    assert same_bits(run(layer, call.rows(shuffled)), together[shuffled])


@pytest.mark.parametrize("format", PATHS, ids=str)
def test_token_result_does_not_depend_on_how_crowded_its_expert_is(format):
    """Every number of tokens from 1 to 18 of an expert, then some larger ones."""
    experts, call = make(*(CROWD if format == PLAIN else METHOD_CROWD), format)
    call.ids[:, 0], call.ids[:, 1] = 2, -1
    layer = build_layer(ENGINE, experts)
    crowded = run(layer, call)
    for t in some(call.tokens):
        assert same_bits(run(layer, call.rows([t])), crowded[[t]]), f"token {t}"
    for tokens in (*range(2, 19), 24, 25, 29):
        assert same_bits(run(layer, call.rows(slice(tokens))), crowded[:tokens]), f"{tokens} tokens"


@pytest.mark.parametrize("exponent", [-104, -109, -112, -115, -118, -121])
def test_sums_too_small_for_fp32_are_the_same_in_a_crowd(exponent):
    """VDPBF16PS flushes denormal sums and FMA does not; huge scales make the difference large."""
    format = Format("FP8_PERCHANNEL", scale_dtype=F32)
    rng = np.random.default_rng(0)
    hidden, intermediate, tokens = 160, 64, 40

    def matrix(rows: int, columns: int, scale: float):
        codes = rng.choice(SUBNORMAL_E4M3, (1, rows, columns))
        return format.matrix(codes, np.full((1, rows, 1), scale, np.float32))

    enlarge = 2.0 ** (4 - exponent)
    experts = Experts(
        matrix(intermediate, hidden, enlarge),
        matrix(intermediate, hidden, enlarge),
        matrix(hidden, intermediate, 1.0),
    )
    call = random_call(0, experts, tokens, top_k=1)
    call.ids[:] = 0
    # Among ordinary tokens of the same expert.
    tiny = np.arange(3, tokens, 5)
    values = decode(call.hidden, BF16)
    values[tiny] *= 2.0**exponent
    layer = build_layer(ENGINE, experts)
    crowd = call.with_hidden(values)
    together = run(layer, crowd)
    assert np.abs(together[tiny]).max() > 1e-3
    for t in tiny:
        assert same_bits(run(layer, crowd.rows([t])), together[[t]]), f"token {t}"


# (threads, sub-pools)
POOLS = [(1, 1), (3, 1), (2, 2), (3, 2), (3, 3)]


@pytest.mark.parametrize(("format", "hidden", "intermediate", "tokens"), every_case(ONE_PER_PATH))
def test_threads_and_pools_do_not_change_a_bit(format, hidden, intermediate, tokens):
    experts, call = make(hidden, intermediate, tokens, format)
    expected_layer = build_layer(ENGINE, experts)
    parts = [call.rows(part) for part in (slice(tokens), slice(1), slice(17))]
    expected = [run(expected_layer, part) for part in parts]
    # All with plain weights; of the other cases each has two.
    place = ONE_PER_PATH.index(format) + hidden
    for threads, subpools in POOLS if format == PLAIN else (POOLS[place % 5], POOLS[(place + 2) % 5]):
        engine = ext.Engine(threads, subpools)
        assert engine.threads == threads
        assert sum(engine.threads_per_subpool) == threads
        assert len(engine.threads_per_subpool) == subpools
        layer = build_layer(engine, experts)
        for part, output in zip(parts, expected, strict=True):
            assert same_bits(run(layer, part), output), f"{threads} threads, {subpools} sub-pools"


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_halves_of_the_experts_in_calls_of_their_own(format):
    """Deferral: some experts of each token wait in the queue while others are computed."""
    experts, call = make(160, 96, 40, format)
    layer = build_layer(ENGINE, experts)
    halves = [call.rows(slice(None)) for _ in range(2)]
    for half, which in zip(halves, (0, 1), strict=True):
        half.ids[half.ids % 2 == which] = -1
    expected = [run(layer, half) for half in halves]
    outputs = [poisoned(call.hidden.shape, F32) for _ in halves]
    for half, output in zip(halves, outputs, strict=True):
        layer.submit(*arguments(half, output, F32))
    ENGINE.sync(0)
    assert all(same_bits(output, alone) for output, alone in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_repeated_calls_give_the_same_bits(format):
    experts, call = make(96, 64, 40, format)
    layer = build_layer(ENGINE, experts)
    first = run(layer, call)
    for _ in range(20):
        assert same_bits(run(layer, call), first)


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_a_call_leaves_nothing_behind_for_the_next(format):
    """A larger call full of NaN and Inf, on this and on another layer of the engine, taints no later call."""
    experts, call = make(100, 70, 33, format)
    layer = build_layer(ENGINE, experts)
    larger = random_experts(9, 4, 400, 300, format)
    larger, larger_hidden = build_layer(ENGINE, larger), larger.hidden
    first = [run(layer, call.rows(slice(n))) for n in (1, 5, 33)]
    for value in (np.nan, np.inf, -np.inf):
        for poisoned_layer, width in ((layer, experts.hidden), (larger, larger_hidden)):
            rows = np.full((64, width), value, np.float32)
            ids = np.arange(128).reshape(64, 2) % 4
            nonsense = call.rows([0] * 64).with_hidden(rows, F32)
            nonsense.ids = ids
            run(poisoned_layer, nonsense)
        for expected, n in zip(first, (1, 5, 33), strict=True):
            assert same_bits(run(layer, call.rows(slice(n))), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_layer_keeps_its_own_copy_of_the_weights(format):
    experts, call = make(64, 64, 16, format)
    layer = build_layer(ENGINE, experts)
    first = run(layer, call)
    for part in experts.parts:
        for tensor in part.tensors():
            tensor.view(np.uint8)[:] = 0x5A
    assert same_bits(run(layer, call), first)
