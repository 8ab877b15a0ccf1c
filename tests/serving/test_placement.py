"""Placement masks and slots: tensors only, no server."""

from __future__ import annotations

import pytest
import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.placement import STRATEGIES, device_expert_masks
from kt_kernel.hybrid.slots import ExpertSlots

MOE_LAYERS = (1, 2, 4)


def masks(strategy: str, total: int) -> torch.Tensor:
    return device_expert_masks(strategy, num_layers=5, moe_layers=MOE_LAYERS, num_experts=8, total=total)


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


@pytest.mark.parametrize("total", [-1, 25])
def test_impossible_totals_are_refused(total):
    with pytest.raises(ConfigurationError, match="the model has 24"):
        masks("uniform", total)


def test_slots_number_the_masked_experts_and_skip_the_rest():
    slots = ExpertSlots(torch.tensor([False, True, False, True, True]))
    ids = torch.tensor([[0, 1], [4, 3], [-1, 1]], dtype=torch.int32)
    before = ids.clone()
    assert slots.from_ids(ids).tolist() == [[-1, 0], [2, 1], [-1, 0]]
    assert torch.equal(ids, before), "the CPU engine may still be reading the ids"
    assert [slots.slot(expert) for expert in range(5)] == [-1, 0, -1, 1, 2]
    assert slots.count == 3
