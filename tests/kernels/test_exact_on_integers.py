"""Risk: a wrong element that an error norm cannot see: a lost product, a swapped column, a row written twice.

integers.py says why the expected values are exact.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import BF16, F16, F32, FORMATS, ONE_PER_PATH, encode, from_bf16
from harness import (
    arguments,
    build_layer,
    every_format_and_shape,
    ext,
    load,
    reference,
    run,
    same_bits,
    token_counts,
)
from integers import MAX_UP, integer_call, integer_experts

ENGINE = ext.Engine(2)


def experts_for(hidden: int, intermediate: int) -> int:
    return 2 if hidden * intermediate > 1 << 20 else 5


def assert_equal(output: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.argwhere(output != expected)
    assert wrong.size == 0, (
        f"{len(wrong)} of {output.size} elements are wrong, the first at [token, column] = {wrong[0]}: "
        f"{output[tuple(wrong[0])]} instead of {expected[tuple(wrong[0])]}"
    )


@pytest.mark.parametrize(("format", "hidden", "intermediate"), every_format_and_shape())
def test_every_element_is_exact_for_every_token_count(format, hidden, intermediate):
    experts = integer_experts(
        hidden * 8191 + intermediate, experts_for(hidden, intermediate), hidden, intermediate, format
    )
    call = integer_call(1, experts, max(token_counts(format)), top_k=2)
    expected = reference(experts, call)
    layer = build_layer(ENGINE, experts)
    for tokens in token_counts(format):
        assert_equal(run(layer, call.rows(slice(tokens))), expected[:tokens].astype(np.float32))


def test_the_data_exercise_the_kernels():
    """The premises of integers.py hold, and the outputs are not mostly zeros."""
    for hidden, intermediate in ((64, 64), (192, 192)):
        experts = integer_experts(7, 5, hidden, intermediate)
        call = integer_call(1, experts, 256, top_k=2)
        expected = reference(experts, call)
        assert np.array_equal(expected, np.round(expected * 2) / 2)
        assert np.count_nonzero(expected) > 0.7 * expected.size
        ups = from_bf16(call.hidden) @ experts.up.decoded(0).T
        assert 10 < np.abs(ups).max() <= MAX_UP


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format_gets_the_same_kind_of_numbers(format):
    experts = integer_experts(7, 2, 192, 192, format)
    for part, values in zip(experts.parts, ({0, 64, 128}, {-1, 0, 1}, {-1 / 64, 0, 1 / 64}), strict=True):
        assert {*part.decoded(1).ravel().tolist()} <= values
        if part.scale is not None:
            assert len(np.unique(part.scale)) > 1


SKEWS = {
    "all tokens to one expert": lambda rng, tokens: np.full((tokens, 3), 4),
    "only the last expert, once": lambda rng, tokens: np.array([[5, -1, -1]] * tokens),
    "one lonely pair": lambda rng, tokens: np.where(np.arange(tokens * 3).reshape(-1, 3) == tokens, 2, -1),
    "experts empty between busy ones": lambda rng, tokens: rng.choice([0, 5], (tokens, 3)),
    "the same expert twice in a token": lambda rng, tokens: np.repeat(
        rng.integers(0, 6, (tokens, 1)), 3, axis=1
    ),
    "one token each, one expert crowded": lambda rng, tokens: np.repeat(
        np.where(np.arange(tokens) < 6, np.arange(tokens), 3)[:, None], 3, axis=1
    ),
    "nothing to do": lambda rng, tokens: np.full((tokens, 3), -1),
}


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
@pytest.mark.parametrize("skew", SKEWS)
def test_skewed_routing_loses_and_doubles_nothing(skew, format):
    place = [*SKEWS].index(skew) + ONE_PER_PATH.index(format)
    ids_dtype = (np.int32, np.int64)[place % 2]
    experts = integer_experts(3, 6, 96, 160, format)
    layer = build_layer(ENGINE, experts, top_k=3)
    for tokens in [t for t in token_counts(format) if t > 0]:
        call = integer_call(tokens, experts, tokens, top_k=3)
        call.ids = np.ascontiguousarray(SKEWS[skew](np.random.default_rng(tokens), tokens), dtype=ids_dtype)
        assert_equal(run(layer, call), reference(experts, call).astype(np.float32))


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_number_of_experts_per_token(top_k, format):
    experts = integer_experts(4, 8, 64, 96, format)
    layer = build_layer(ENGINE, experts, top_k=top_k)
    call = integer_call(top_k, experts, 33, top_k)
    assert_equal(run(layer, call), reference(experts, call).astype(np.float32))


@pytest.mark.parametrize("output_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("hidden_dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (33, 70), (7, 3)])
def test_each_dtype_in_and_out_rounds_once(hidden, intermediate, hidden_dtype, output_dtype):
    """Conversions come before and after the multiplication: the format of the weights plays no part."""
    experts = integer_experts(5, 4, hidden, intermediate)
    layer = build_layer(ENGINE, experts)
    call = integer_call(2, experts, 17, top_k=2)
    typed = call.with_hidden((call.hidden != 0).astype(np.float32), hidden_dtype)
    expected = reference(experts, call).astype(np.float32)
    assert_equal(run(layer, typed, output_dtype), encode(expected, output_dtype))


@pytest.mark.parametrize("output_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_accumulate_adds_to_what_the_output_holds(format, output_dtype):
    experts = integer_experts(6, 4, 72, 40, format)
    layer = build_layer(ENGINE, experts)
    for tokens in (1, 5, 33):
        call = integer_call(3, experts, tokens, top_k=2)
        before = np.random.default_rng(tokens).integers(-50, 50, call.hidden.shape).astype(np.float32)
        output = encode(before, output_dtype)
        layer.forward(*arguments(call, output, output_dtype, accumulate=1))
        expected = (before + reference(experts, call)).astype(np.float32)
        assert_equal(output, encode(expected, output_dtype))


def test_accumulating_nothing_leaves_the_output_alone():
    experts = integer_experts(6, 4, 72, 40)
    layer = build_layer(ENGINE, experts)
    call = integer_call(3, experts, 9, top_k=2)
    call.ids[:] = -1
    before = np.random.default_rng(0).standard_normal(call.hidden.shape, dtype=np.float32)
    output = before.copy()
    layer.forward(*arguments(call, output, F32, accumulate=1))
    assert same_bits(output, before)


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_experts_on_the_device_are_left_out_and_the_mask_is_read_live(format):
    experts = integer_experts(8, 6, 64, 64, format)
    layer = build_layer(ENGINE, experts)
    call = integer_call(4, experts, 33, top_k=2)
    mask = np.array([0, 1, 0, 0, 1, 0], np.uint8)
    layer.set_expert_mask(mask.ctypes.data)
    assert_equal(run(layer, call), reference(experts, call, on_device={1, 4}).astype(np.float32))
    mask[:] = [1, 0, 0, 0, 0, 1]
    assert_equal(run(layer, call), reference(experts, call, on_device={0, 5}).astype(np.float32))
    mask[:] = 1
    assert_equal(run(layer, call), np.zeros(call.hidden.shape, np.float32))
    layer.set_expert_mask(0)
    assert_equal(run(layer, call), reference(experts, call).astype(np.float32))


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_loading_again_replaces_the_weights(format):
    first, second = (integer_experts(seed, 4, 100, 60, format) for seed in (9, 10))
    layer = build_layer(ENGINE, first)
    call = integer_call(5, first, 16, top_k=2)
    assert_equal(run(layer, call), reference(first, call).astype(np.float32))
    load(layer, second)
    assert_equal(run(layer, call), reference(second, call).astype(np.float32))


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_few_tokens_left_over_from_a_crowd_are_exact(format):
    """One expert's tokens are computed in blocks, and what is left over as few tokens are, whose columns are
    added to in several calls where there are many.
    """
    hidden, intermediate = format.fit(576), format.fit(64)
    experts = integer_experts(3, 1, hidden, intermediate, format)
    call = integer_call(2, experts, 516, top_k=1)
    call.ids[:] = 0  # none is skipped: a block has 512
    expected = reference(experts, call)
    layer = build_layer(ENGINE, experts, max_tokens=516)
    for tokens in range(513, 517):
        assert_equal(run(layer, call.rows(slice(tokens))), expected[:tokens].astype(np.float32))
