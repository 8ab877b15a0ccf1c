"""Which cold experts are fetched: a wrong split makes CPU or bus wait for the other."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.hybrid.misses import split_misses

SECONDS = st.integers(1, 50)
TOKENS = st.dictionaries(st.integers(0, 9), st.integers(0, 6), max_size=6)


def total_seconds(tokens_of, fetched, cpu_seconds_of, fetch_seconds):
    on_cpu = sum(cpu_seconds_of(t) for expert, t in tokens_of.items() if t and expert not in fetched)
    return max(on_cpu, len(fetched) * fetch_seconds)


@given(TOKENS, SECONDS, SECONDS, SECONDS, st.integers(0, 6))
def test_no_other_choice_is_sooner_done_and_none_as_soon_fetches_fewer(tokens_of, base, slope, fetch, most):
    def cpu_seconds_of(tokens):
        return base + slope * tokens

    chosen = split_misses(tokens_of, cpu_seconds_of, fetch, most)
    seconds = total_seconds(tokens_of, chosen, cpu_seconds_of, fetch)
    used = [expert for expert, tokens in tokens_of.items() if tokens]
    for count in range(min(most, len(used)) + 1):
        for other in itertools.combinations(used, count):
            other_seconds = total_seconds(tokens_of, other, cpu_seconds_of, fetch)
            assert (seconds, len(chosen)) <= (other_seconds, count)


@given(TOKENS, SECONDS, st.integers(0, 6))
def test_only_experts_with_tokens_are_fetched_and_never_too_many(tokens_of, fetch, most):
    chosen = split_misses(tokens_of, lambda tokens: 10.0 * tokens, fetch, most)
    assert len(set(chosen)) == len(chosen) <= most
    assert all(tokens_of[expert] for expert in chosen)


def test_a_slow_bus_leaves_all_to_the_cpu():
    assert split_misses({1: 1, 2: 1}, lambda tokens: 1.0, fetch_seconds=5.0, most=8) == ()


def test_the_experts_that_cost_the_cpu_most_are_fetched():
    assert split_misses({1: 1, 2: 30, 3: 2}, lambda tokens: tokens, fetch_seconds=1.0, most=1) == (2,)


def test_without_cold_experts_nothing_is_fetched():
    assert split_misses({}, lambda tokens: 1.0, fetch_seconds=1.0, most=8) == ()


def test_what_is_as_soon_done_without_fetching_is_not_fetched():
    assert split_misses({1: 1}, lambda tokens: 1.0, fetch_seconds=1.0, most=8) == ()
    assert split_misses({1: 5, 2: 1, 3: 1}, lambda tokens: tokens, fetch_seconds=1.0, most=8) == (1,)


def test_of_experts_that_cost_the_same_the_first_are_fetched():
    """All ranks must choose the same ones, whatever order they count in."""
    assert split_misses({3: 4, 1: 4, 2: 4}, lambda tokens: tokens, fetch_seconds=1.0, most=1) == (1,)
