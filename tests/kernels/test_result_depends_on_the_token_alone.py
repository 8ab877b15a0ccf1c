"""Risk: a token gets other bits with other neighbours, threads, pools, or earlier calls.

All comparisons are of bits, on random data, where any other order of summation would show.
"""

from __future__ import annotations

import numpy as np
import pytest
from harness import F32, SMALL_SWEEP, build_layer, ext, poisoned, random_call, random_experts, run, same_bits

ENGINE = ext.Engine(2)
# (hidden, intermediate, tokens): one long enough to be cut in K, sizes that fill nothing, fewer panels than
# pools.
CASES = [(2048, 768, 300), (64, 576, 65), (577, 191, 33), (33, 33, 40), (1, 1, 5)]
CROWD = (2048, 64, 700)
if SMALL_SWEEP:
    CASES, CROWD = [(192, 96, 33), (33, 70, 18)], (768, 32, 200)


def make(hidden: int, intermediate: int, tokens: int):
    experts = random_experts(hidden + intermediate, 4, hidden, intermediate)
    return experts, random_call(hidden, experts, tokens, top_k=2)


def some(tokens: int) -> list[int]:
    """A dozen places of a batch: its ends, around tile edges, and some between."""
    return sorted({t for t in (0, 1, 2, 11, 12, 15, 16, 31, 32, 63, 100, 255, 256, tokens - 1) if t < tokens})


@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), CASES)
def test_token_result_does_not_depend_on_its_neighbours(hidden, intermediate, tokens):
    experts, call = make(hidden, intermediate, tokens)
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


def test_token_result_does_not_depend_on_how_crowded_its_expert_is():
    experts, call = make(*CROWD)
    call.ids[:, 0], call.ids[:, 1] = 2, -1
    layer = build_layer(ENGINE, experts)
    crowded = run(layer, call)
    for t in some(call.tokens):
        assert same_bits(run(layer, call.rows([t])), crowded[[t]]), f"token {t}"


@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), CASES)
@pytest.mark.parametrize(("threads", "subpools"), [(1, 1), (3, 1), (2, 2), (3, 2), (3, 3)])
def test_threads_and_pools_do_not_change_a_bit(threads, subpools, hidden, intermediate, tokens):
    experts, call = make(hidden, intermediate, tokens)
    engine = ext.Engine(threads, subpools)
    assert engine.threads == threads
    assert sum(engine.threads_per_subpool) == threads
    assert len(engine.threads_per_subpool) == subpools
    expected_layer, layer = build_layer(ENGINE, experts), build_layer(engine, experts)
    for part in (slice(tokens), slice(1), slice(17)):
        assert same_bits(run(layer, call.rows(part)), run(expected_layer, call.rows(part)))


def test_repeated_calls_give_the_same_bits():
    experts, call = make(96, 64, 40)
    layer = build_layer(ENGINE, experts)
    first = run(layer, call)
    for _ in range(20):
        assert same_bits(run(layer, call), first)


def test_a_call_leaves_nothing_behind_for_the_next():
    """A larger call full of NaN and Inf, on this and on another layer of the engine, taints no later call."""
    experts, call = make(100, 70, 33)
    layer = build_layer(ENGINE, experts)
    larger = build_layer(ENGINE, random_experts(9, 4, 400, 300))
    first = [run(layer, call.rows(slice(n))) for n in (1, 5, 33)]
    for value in (np.nan, np.inf, -np.inf):
        for poisoned_layer, width in ((layer, 100), (larger, 400)):
            rows = np.full((64, width), value, np.float32)
            ids = np.arange(128).reshape(64, 2) % 4
            nonsense = call.rows([0] * 64).with_hidden(rows, F32)
            nonsense.ids = ids
            run(poisoned_layer, nonsense)
        for expected, n in zip(first, (1, 5, 33), strict=True):
            assert same_bits(run(layer, call.rows(slice(n))), expected)


def test_the_layer_keeps_its_own_copy_of_the_weights():
    experts, call = make(64, 64, 16)
    layer = build_layer(ENGINE, experts)
    first = run(layer, call)
    for matrices in (experts.gate, experts.up, experts.down):
        matrices[:] = poisoned((1,), 0)
    assert same_bits(run(layer, call), first)
