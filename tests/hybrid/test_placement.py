"""Placement masks, slots and tables: which expert is where, and that both halves of a forward agree on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.errors import CallOrderError, ConfigurationError
from kt_kernel.hybrid.placement import STRATEGIES, device_expert_masks
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement

MOE_LAYERS = (1, 2, 4)
CPU = torch.device("cpu")


def masks(strategy: str, total: int) -> torch.Tensor:
    counts = torch.arange(40).view(5, 8) % 7
    return device_expert_masks(
        strategy, num_layers=5, moe_layers=MOE_LAYERS, num_experts=8, total=total, counts=counts
    )


def placements(num_experts: int = 8) -> st.SearchStrategy[Placement]:
    """Any placement of the layer, with and without empty slots."""
    return st.lists(st.booleans(), min_size=num_experts, max_size=num_experts).flatmap(
        lambda mask: st.integers(sum(mask), num_experts).map(
            lambda capacity: Placement.initial(torch.tensor(mask), capacity)
        )
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("total", [0, 1, 7, 8, 13, 24])
def test_exactly_the_asked_number_and_only_in_layers_with_experts(strategy, total):
    mask = masks(strategy, total)
    assert int(mask.sum()) == total
    assert not mask[[0, 3]].any()
    assert torch.equal(mask, masks(strategy, total))


def test_uniform_differs_by_at_most_one_and_takes_the_lowest_experts():
    assert [row.nonzero().flatten().tolist() for row in masks("uniform", 7)] == [
        [],
        [0, 1, 2],
        [0, 1],
        [],
        [0, 1],
    ]


def test_front_loading_fills_a_layer_before_the_next():
    assert masks("front-loading", 10).sum(1).tolist() == [0, 8, 2, 0, 0]


def test_frequency_takes_the_most_used_of_the_whole_model_and_ignores_layers_without_experts():
    counts = torch.zeros(5, 8)
    counts[0] = 1000
    counts[1, 6], counts[4, 3], counts[4, 5], counts[2, 0] = 9, 8, 7, 1
    mask = device_expert_masks("frequency", 5, MOE_LAYERS, 8, 3, counts)
    assert mask.nonzero().tolist() == [[1, 6], [4, 3], [4, 5]]


def test_frequency_without_counts_is_refused():
    with pytest.raises(ConfigurationError, match="needs counts of an earlier run"):
        device_expert_masks("frequency", 5, MOE_LAYERS, 8, 3)


def test_counts_of_another_model_are_refused():
    with pytest.raises(ConfigurationError, match=r"shape \[5, 4\], but the model has \[5, 8\]"):
        device_expert_masks("frequency", 5, MOE_LAYERS, 8, 3, torch.ones(5, 4))


@pytest.mark.parametrize("total", [-1, 25])
def test_impossible_totals_are_refused(total):
    with pytest.raises(ConfigurationError, match="the model has 24"):
        masks("uniform", total)


def test_slots_number_the_masked_experts_and_skip_the_rest():
    placement = Placement.initial(torch.tensor([False, True, False, True, True]), capacity=4)
    assert placement.expert_of_slot == (1, 3, 4, EMPTY)
    assert [placement.slot(expert) for expert in range(5)] == [-1, 0, -1, 1, 2]
    assert (placement.version, placement.count, placement.capacity) == (0, 3, 4)
    assert placement.mask.tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("slots", [(0, 0), (2, EMPTY, 2)])
def test_one_expert_in_two_slots_is_refused(slots):
    with pytest.raises(ConfigurationError, match="was given two slots"):
        Placement(0, slots, num_experts=3)


@pytest.mark.parametrize("expert", [3, -2])
def test_an_expert_that_does_not_exist_gets_no_slot(expert):
    with pytest.raises(ConfigurationError, match="the layer has 3 experts"):
        Placement(0, (0, 1), num_experts=3).with_slots({1: expert})


def test_more_experts_than_slots_are_refused():
    with pytest.raises(ConfigurationError, match="2 experts were chosen for 1 slots"):
        Placement.initial(torch.tensor([True, True]), capacity=1)


@given(placements(), st.lists(st.integers(-1, 7), min_size=4, max_size=4))
def test_every_id_is_computed_once_by_the_device_or_by_the_cpu(placement, ids):
    tables = LayerPlacement(placement).tables(CPU)
    ids = torch.tensor(ids, dtype=torch.int32).view(2, 2)
    before = ids.clone()
    slots = tables.slots(ids)
    assert torch.equal(ids, before), "the CPU engine may still be reading the ids"
    assert slots.dtype == ids.dtype
    for expert, slot in zip(ids.flatten().tolist(), slots.flatten().tolist(), strict=True):
        skipped_by_cpu = bool(tables.on_device[expert])
        assert skipped_by_cpu == (slot != EMPTY)
        if slot != EMPTY:
            assert placement.expert_of_slot[slot] == expert
    assert tables.slots(torch.tensor([[-1]])).item() == EMPTY
    assert not tables.on_device[-1]


def test_a_forward_that_runs_across_a_switch_keeps_one_placement():
    layer = LayerPlacement(Placement.initial(torch.tensor([True, False, False])))
    taken = layer.tables(CPU)
    layer.switch(layer.current.with_slots({0: 2}))
    ids = torch.tensor([[0, 1, 2]])
    assert taken.slots(ids).tolist() == [[0, -1, -1]]
    assert taken.on_device.tolist() == [True, False, False, False]
    assert layer.tables(CPU).slots(ids).tolist() == [[-1, -1, 0]]


def test_an_accelerator_keeps_its_addresses_so_captured_graphs_stay_valid():
    meta = torch.device("meta")  # any device that is not the CPU
    layer = LayerPlacement(Placement.initial(torch.tensor([True, False])))
    tables = layer.tables(meta)
    slot_of = tables.slot_of
    layer.switch(layer.current.with_slots({0: 1}))
    assert layer.tables(meta) is tables
    assert tables.slot_of is slot_of


def test_a_placement_made_from_an_old_version_is_not_switched_to():
    layer = LayerPlacement(Placement.initial(torch.tensor([True, True, False])))
    stale = layer.current.with_slots({0: 2})
    layer.switch(layer.current.with_slots({1: EMPTY}))
    with pytest.raises(CallOrderError, match="cannot follow version 1"):
        layer.switch(stale)
