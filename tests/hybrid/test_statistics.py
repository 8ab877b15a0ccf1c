"""Statistics: a use lost, counted twice or booked to the wrong placement would move the wrong experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement
from kt_kernel.hybrid.statistics import LayerStatistics

CPU = torch.device("cpu")


@given(st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=6))
def test_every_use_is_counted_once_and_padding_never(steps):
    statistics = LayerStatistics(5)
    for ids in steps:
        statistics.count(torch.tensor([ids], dtype=torch.int32))
    flat = [expert for ids in steps for expert in ids]
    assert statistics.totals().tolist() == [flat.count(expert) for expert in range(5)]


def test_a_call_without_tokens_counts_nothing():
    statistics = LayerStatistics(4)
    statistics.count(torch.empty(0, 2, dtype=torch.int64))
    statistics.advance()
    assert statistics.totals().sum() == 0
    assert statistics.decayed.tolist() == [0, 0, 0, 0]


def test_a_use_is_a_hit_under_the_placement_of_its_time():
    layer = LayerPlacement(Placement.initial(torch.tensor([True, False, False])))
    statistics = LayerStatistics(3)
    statistics.count(torch.tensor([[0, 1], [0, -1]]))
    statistics.settle(layer.tables(CPU))
    layer.switch(layer.current.with_slots({0: 1}))
    statistics.count(torch.tensor([[0, 1], [1, 2]]))
    assert statistics.hits(layer.tables(CPU)) == (2 + 2, 3 + 4)
    assert statistics.hits(layer.tables(CPU)) == (4, 7), "asking counts nothing"


def test_uses_that_the_cpu_counted_are_uses_and_no_hits_and_forgotten_ones_are_none():
    layer = LayerPlacement(Placement.initial(torch.tensor([True, False, False])))
    statistics = LayerStatistics(3)
    uses = [5, 0, 7]
    statistics.count_from(lambda: uses)
    statistics.forget()
    uses = [6, 2, 7]
    statistics.count(torch.tensor([[0, 1]]))
    assert statistics.totals().tolist() == [2, 3, 0]
    assert statistics.hits(layer.tables(CPU)) == (1, 5)


def test_hits_with_nothing_on_the_device():
    layer = LayerPlacement(Placement(0, (EMPTY,), num_experts=3))
    statistics = LayerStatistics(3)
    statistics.count(torch.tensor([[0, -1]]))
    assert statistics.hits(layer.tables(CPU)) == (0, 1)


def test_old_uses_weigh_half_after_one_half_life():
    statistics = LayerStatistics(3, half_life_tokens=100)
    statistics.count(torch.tensor([[0, 1]]))
    statistics.advance()
    before = statistics.decayed
    statistics.count(torch.tensor([[2, 2]]).expand(100, 2))
    statistics.advance()
    assert statistics.decayed[:2].tolist() == pytest.approx((before[:2] / 2).tolist())
    assert statistics.decayed[2] > before.sum(), "the new topic rules"


def test_decayed_counts_do_not_depend_on_how_often_they_are_asked_for():
    """A long prefill is one interval, decoding many; neither may outweigh the other."""
    often, rarely = (LayerStatistics(4, half_life_tokens=50) for _ in range(2))
    ids = torch.tensor([[0, 1], [0, 2]])
    for _ in range(60):
        often.count(ids)
        often.advance()
    rarely.count(ids.repeat(60, 1))
    rarely.advance()
    assert often.decayed.tolist() == pytest.approx(rarely.decayed.tolist())


def test_what_was_forgotten_weighs_nothing_and_counting_goes_on():
    layer = LayerPlacement(Placement(0, (1,), 4))
    statistics = LayerStatistics(4)
    for mode in (False, True):  # servers warm up in inference mode
        with torch.inference_mode(mode):
            statistics.count(torch.tensor([[0, 1], [1, 3]]))
            statistics.settle(layer.tables(CPU))
            statistics.advance()
    statistics.count(torch.tensor([[2, 2]]))
    statistics.forget()
    assert statistics.hits(layer.tables(CPU)) == (0, 0)
    statistics.advance()
    assert statistics.decayed.tolist() == [0, 0, 0, 0]
    statistics.count(torch.tensor([[1, 2]]))
    statistics.advance()
    assert statistics.totals().tolist() == [0, 1, 1, 0]
    assert statistics.hits(layer.tables(CPU)) == (1, 2)
    assert statistics.decayed[1] == statistics.decayed[2] > statistics.decayed.sum() / 3


def test_captured_counting_needs_no_memory_of_its_own():
    """A tensor made inside the capture of a graph would be made anew by every replay, and lose its counts."""
    statistics = LayerStatistics(4)
    address = statistics._counts.data_ptr()
    statistics.count(torch.tensor([[0, 1]]))
    statistics.settle(LayerPlacement(Placement(0, (1,), 4)).tables(CPU))
    statistics.count(torch.tensor([[0, 1]]))
    assert statistics._counts.data_ptr() == address


def test_what_was_made_in_inference_mode_can_be_used_outside():
    """Servers build and warm up in inference mode; steps may begin outside of it."""
    with torch.inference_mode():
        statistics = LayerStatistics(4)
        layer = LayerPlacement(Placement(0, (1, EMPTY), 4))
        layer.tables(torch.device("meta"))  # stands for an accelerator
    statistics.count(torch.tensor([[0, 1]]))
    statistics.settle(layer.tables(CPU))
    layer.switch(layer.current.with_slots({0: 2}))
    with torch.inference_mode():
        statistics.count(torch.tensor([[2, 1]]))
        assert statistics.hits(layer.tables(CPU)) == (2, 4)
