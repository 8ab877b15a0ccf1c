"""The plan of an update: a copy too many is bytes over the bus, a wrong one is a lost hit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.hybrid.plan import Move, admitted, choose, retired
from kt_kernel.hybrid.slots import EMPTY, Placement

EXPERTS = 7


@st.composite
def situations(draw):
    """Counts with many ties and zeros, and any placement."""
    counts = draw(st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS))
    order = draw(st.permutations(range(EXPERTS)))
    capacity = draw(st.integers(0, EXPERTS))
    slots = tuple(expert if draw(st.booleans()) else EMPTY for expert in order[:capacity])
    return torch.tensor(counts, dtype=torch.float64), Placement(0, slots, EXPERTS)


def hits(counts: torch.Tensor, placement: Placement) -> float:
    return float(counts[list(placement.experts)].sum())


@given(situations())
def test_no_other_placement_of_that_size_has_more_hits(situation):
    counts, current = situation
    after = admitted(retired(current, choose(counts, current)), choose(counts, current))
    assert hits(counts, after) == float(counts.sort(descending=True).values[: current.capacity].sum())


@given(situations())
def test_no_smaller_number_of_copies_gives_as_many_hits(situation):
    """Each copy brings one expert in: with n copies, at best the n best newcomers replace the n worst."""
    counts, current = situation
    moves = choose(counts, current)
    best = float(counts.sort(descending=True).values[: current.capacity].sum())
    outside = sorted((float(counts[e]) for e in range(EXPERTS) if current.slot(e) == EMPTY), reverse=True)
    inside = sorted(float(counts[e]) if e != EMPTY else 0.0 for e in current.expert_of_slot)
    for copies in range(len(moves)):
        gain = sum(outside[:copies]) - sum(inside[:copies])
        assert hits(counts, current) + gain < best


@given(situations())
def test_a_second_plan_from_the_same_counts_moves_nothing(situation):
    counts, current = situation
    moves = choose(counts, current)
    assert choose(counts, admitted(retired(current, moves), moves)) == ()


@given(situations())
def test_moves_name_what_is_there(situation):
    counts, current = situation
    for slot, leaving, entering in choose(counts, current):
        assert current.expert_of_slot[slot] == leaving
        assert current.slot(entering) == EMPTY


@given(situations(), st.floats(0, 3))
def test_a_margin_drops_the_moves_that_chance_alone_may_suggest_and_no_other(situation, margin):
    counts, current = situation
    everything = choose(counts, current)
    kept = choose(counts, current, margin)
    assert kept == everything[: len(kept)]
    for number, (_, leaving, entering) in enumerate(everything):
        new, old = float(counts[entering]), 0.0 if leaving == EMPTY else float(counts[leaving])
        assert (new - old > margin * (new + old) ** 0.5) == (number < len(kept))


def test_who_has_a_slot_keeps_it_when_the_counts_are_equal():
    current = Placement(0, (3, 1), num_experts=4)
    assert choose(torch.tensor([5.0, 5, 5, 5]), current) == ()


def test_experts_never_used_are_not_copied_into_empty_slots():
    current = Placement(0, (EMPTY, EMPTY, 0), num_experts=4)
    assert choose(torch.tensor([0.0, 0, 2, 0]), current) == (Move(slot=0, leaving=EMPTY, entering=2),)


def test_the_most_useful_move_comes_first():
    current = Placement(0, (0, 1), num_experts=4)
    assert choose(torch.tensor([2.0, 1, 3, 9]), current) == (Move(1, 1, 3), Move(0, 0, 2))
