"""The chunk size that is chosen where experts are streamed, and the estimates behind it."""

from __future__ import annotations

import dataclasses

import pytest

from kt_kernel.hybrid.prefill_plan import (
    GIB,
    LARGEST_CHUNK,
    PrefillMachine,
    PrefillMemory,
    PrefillModel,
    candidates,
    choose_chunk,
    chunk_seconds,
    speed_table,
    tokens_per_second,
)

# MiniMax-M2.1 in FP8: 62 layers x 256 experts x 14.16 MB.
MODEL = PrefillModel(
    layers=62,
    moe_layers=62,
    experts=256,
    top_k=8,
    hidden=3072,
    intermediate=1536,
    heads=48,
    head_dim=128,
    expert_bytes=14.16e6,
    slot_bytes=14.16e6,
    kv_bytes=253952,
    other_bytes=5.3e9,
)
PCIE_5 = PrefillMachine(bus=50e9, flops=175e12)
CHUNKS = (1024, 2048, 4096, 8192, 16384, 32768)
MEMORY = PrefillMemory(80 * GIB, slots=2 * 256 * 14.16e6)


def choose(memory: PrefillMemory = MEMORY, **changes: int):
    wanted = {"threshold": 1024, "stock": 4096, "context": 196608, **changes}
    return choose_chunk(MODEL, PCIE_5, memory, **wanted)


@pytest.mark.parametrize(("prompt", "expected"), [(2048, 435), (8192, 1750), (32768, 3900)])
def test_the_estimate_for_minimax_is_what_hand_arithmetic_gives(prompt, expected):
    """225 GB at 50 GB/s are 4.5 s a chunk; 32768 tokens need about 8.3 s of computing."""
    assert tokens_per_second(MODEL, PCIE_5, prompt, prompt) == pytest.approx(expected, rel=0.05)


def test_a_prompt_streams_all_experts_once_per_chunk():
    bytes_of_a_pass = 62 * 256 * 14.16e6
    for chunk in (2048, 4096):
        seconds = 32768 / tokens_per_second(MODEL, PCIE_5, 32768, chunk)
        assert seconds >= 32768 / chunk * bytes_of_a_pass / 50e9


def test_computing_is_hidden_behind_the_bus_and_not_added_to_it():
    assert chunk_seconds(MODEL, PCIE_5, 8192) == chunk_seconds(MODEL, PCIE_5, 1)
    fast_bus = dataclasses.replace(PCIE_5, bus=1e15, seconds_per_copy=0.0)
    assert chunk_seconds(MODEL, fast_bus, 8192) > 10 * chunk_seconds(MODEL, fast_bus, 64)


def test_larger_chunks_faster_buses_and_faster_devices_are_never_slower():
    for prompt in (100, 5000, 32768):
        by_chunk = [tokens_per_second(MODEL, PCIE_5, prompt, chunk) for chunk in CHUNKS]
        assert by_chunk == sorted(by_chunk)
        for name in ("bus", "flops"):
            faster = [dataclasses.replace(PCIE_5, **{name: value}) for value in (1e9, 1e11, 1e13, 1e15)]
            by_machine = [tokens_per_second(MODEL, machine, prompt, 4096) for machine in faster]
            assert by_machine == sorted(by_machine)


def test_tokens_behind_others_cost_more_attention():
    assert MODEL.compute_seconds(1024, 65536, 1e14) > MODEL.compute_seconds(1024, 0, 1e14)
    # two chunks see the same pairs of tokens as one
    whole = MODEL.compute_seconds(4096, 0, 1e14)
    halves = MODEL.compute_seconds(2048, 0, 1e14) + MODEL.compute_seconds(2048, 2048, 1e14)
    assert halves == pytest.approx(whole)


def test_the_chosen_chunk_fits_into_memory_and_grows_with_it():
    chosen = []
    for gib in (16, 24, 32, 48, 80, 141):
        memory = PrefillMemory(gib * GIB, slots=2 * 256 * 14.16e6)
        choice = choose(memory)
        assert choice.chunk <= max(4096, memory.largest_chunk(MODEL, choice.prompt))
        chosen.append(choice.chunk)
    assert chosen == sorted(chosen)
    assert chosen[0] == 4096
    assert chosen[-1] == 32768


@pytest.mark.parametrize("taken", ["slots", "residents"])
def test_memory_that_others_take_makes_chunks_smaller(taken):
    less = dataclasses.replace(MEMORY, **{taken: getattr(MEMORY, taken) + 60e9})
    assert less.largest_chunk(MODEL, 32768) < MEMORY.largest_chunk(MODEL, 32768)
    assert choose(less).chunk < choose().chunk


def test_what_the_user_left_for_activations_is_a_bound():
    chunk = 8192
    bounded = dataclasses.replace(MEMORY, activations=chunk * MODEL.activation_bytes_per_token + 1)
    assert choose(bounded).chunk == chunk


@pytest.mark.parametrize("threshold", [1, 4096, 5000, 20000, 40000])
def test_no_chunk_is_below_the_threshold_or_the_servers_own_size(threshold):
    for stock in (2048, 4096, 8192, 16384):
        chunk = choose(threshold=threshold, stock=stock).chunk
        assert chunk >= max(threshold, stock)


def test_a_threshold_that_memory_cannot_hold_is_left_to_be_refused():
    small = PrefillMemory(24 * GIB, slots=2 * 256 * 14.16e6)
    assert 4096 <= choose(small, threshold=60000).chunk < 60000


def test_the_choice_is_better_than_the_servers_own():
    choice = choose()
    assert choice.tokens_per_second > 3 * choice.stock


def test_no_longer_chunks_than_the_context_and_none_that_gain_nothing():
    assert choose(context=8192).chunk == 8192
    assert choose(context=2048).chunk == 4096
    # where computing alone decides, length gains nothing
    fast_bus = dataclasses.replace(PCIE_5, bus=1e15, seconds_per_copy=0.0)
    choice = choose_chunk(MODEL, fast_bus, MEMORY, threshold=1024, stock=4096, context=196608)
    assert choice.chunk == 4096


def test_candidates_are_powers_of_two_and_the_least():
    assert candidates(5000, 40000) == [5000, 8192, 16384, 32768]
    assert candidates(4096, 4096) == [4096]
    assert candidates(2048, 1 << 30)[-1] == LARGEST_CHUNK


def test_the_table_has_a_row_per_prompt_and_a_column_per_chunk():
    lines = speed_table(MODEL, PCIE_5, (2048, 8192), (2048, 4096, 8192)).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {5}
    assert f"{tokens_per_second(MODEL, PCIE_5, 8192, 4096):.0f}" in lines[3]
