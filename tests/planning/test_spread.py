"""A host must not be promised, or charged with, what another one holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from test_estimate import four_layers, zen4

from kt_kernel.planning.estimate import expected_speeds
from kt_kernel.planning.memory import memory_rows
from kt_kernel.planning.model_facts import SAFETENSORS
from kt_kernel.planning.spread import Spread
from kt_kernel.planning.user_options import UserOptions

FACTS = four_layers("RAWINT4", SAFETENSORS, 4.5, "BF16")


def _options(words: str) -> UserOptions:
    return UserOptions(tuple(words.split()))


@pytest.mark.parametrize(
    ("words", "spread", "processes", "hosts_of_a_layer"),
    [
        ("", Spread(), 1, 1),
        ("--tp-size 4", Spread(1, 1, 4), 4, 1),
        ("--tp 4 --nnodes 2", Spread(2, 1, 4), 2, 2),
        ("--pp-size 2 --nnodes 2", Spread(2, 2, 1), 1, 1),
        ("--tp-size 4 --pp-size 2 --nnodes 4", Spread(4, 2, 4), 2, 2),
    ],
)
def test_what_is_where_follows_from_the_options(words, spread, processes, hosts_of_a_layer):
    assert Spread.of(_options(words)) == spread
    assert (spread.processes, spread.hosts_of_a_layer) == (processes, hosts_of_a_layer)


@pytest.mark.parametrize("words", ["--tp-size 2", "--pp-size 2"])
def test_each_of_two_hosts_holds_half(words):
    def held(options: str) -> dict[str, float]:
        given = _options(f"--max-total-tokens 8192 {options}")
        rows = memory_rows(FACTS, zen4(36), given, None, None).rows
        return {row.what.split(",")[0].split(" (")[0]: row.bytes for row in rows}

    one, two = held(words), held(f"{words} --nnodes 2")
    for what in ("experts", "other weights", "KV cache", "processes"):
        assert two[what] == pytest.approx(one[what] / 2), what
    assert two["while loading: a layer"] == one["while loading: a layer"]


def test_hosts_that_share_a_layer_read_it_in_half_the_time_and_pay_for_the_sums():
    def seconds(options: str) -> float:
        _, decode = expected_speeds(FACTS, zen4(36), _options(options), None, None)
        return 1 / decode.tokens_per_second

    alone, ranks, hosts = (seconds(words) for words in ("", "--tp-size 2", "--tp-size 2 --nnodes 2"))
    stages = seconds("--pp-size 2 --nnodes 2")
    assert hosts < ranks and alone < ranks
    assert all(earlier < later for earlier, later in pairwise((alone, stages, ranks)))
