"""Deferral: which experts wait, and that what waits arrives, at the right layer, whatever lies between."""

import logging

import pytest
import torch
from api_support import (
    EXPERTS,
    TOP_K,
    assert_close,
    loaded_wrapper,
    make_wrapper,
    random_call,
    random_experts,
    reference,
)

from kt_kernel.calls.deferral import select_deferred_experts, without_experts
from kt_kernel.errors import InputError


def slow_rule(ids, weights, protected_k):
    """The rule in plain Python: protected for one token = immediate for all."""
    protected = set()
    for row_ids, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        ranked = sorted((-weight, place) for place, weight in enumerate(row_weights) if row_ids[place] >= 0)
        protected |= {row_ids[place] for _, place in ranked[:protected_k]}
    immediate = [[e if e in protected else -1 for e in row] for row in ids.tolist()]
    deferred = [[e if e not in protected else -1 for e in row] for row in ids.tolist()]
    return torch.tensor(immediate, dtype=ids.dtype), torch.tensor(deferred, dtype=ids.dtype)


def test_leaving_experts_out_does_not_change_the_callers_ids():
    ids = torch.tensor([[0, 3, -1], [2, 3, EXPERTS + 1]])
    before, skipped = ids.clone(), torch.tensor([e in (0, 3) for e in range(EXPERTS + 1)])
    assert without_experts(ids, skipped).tolist() == [[-1, -1, -1], [2, -1, EXPERTS + 1]]
    assert torch.equal(ids, before)


@pytest.mark.parametrize("protected_k", range(TOP_K + 2))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_split_follows_the_rule(protected_k, dtype):
    for seed in range(50):
        _, ids, weights = random_call(seed, 1 + seed % 7)
        ids = torch.where(
            torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.2, -1, ids
        ).to(dtype)
        before = ids.clone()
        immediate, deferred = select_deferred_experts(ids, weights, protected_k, EXPERTS)
        expected = slow_rule(ids, weights, protected_k)
        assert torch.equal(immediate, expected[0]) and torch.equal(deferred, expected[1]), f"seed {seed}"
        assert torch.equal(ids, before)
        assert int((deferred >= 0).sum(dim=1).max()) <= max(TOP_K - protected_k, 0)


def test_skipped_ids_take_no_protected_place():
    ids = torch.tensor([[-1, 4, 6]])
    weights = torch.tensor([[0.9, 0.05, 0.04]])
    immediate, deferred = select_deferred_experts(ids, weights, 1, EXPERTS)
    assert immediate.tolist() == [[-1, 4, -1]] and deferred.tolist() == [[-1, -1, 6]]


def test_wrapper_offers_the_rule():
    wrapper = make_wrapper()
    _, ids, weights = random_call(0, 4)
    for actual, expected in zip(
        wrapper.select_deferred_experts(ids, weights, 1), slow_rule(ids, weights, 1), strict=True
    ):
        assert torch.equal(actual, expected)


class Model:
    """MoE layers with dense layers between them, and the same model in float64."""

    def __init__(self, layer_indices, max_deferred, **changes):
        self.experts = [random_experts(seed=100 + index) for index in layer_indices]
        self.max_deferred = max_deferred
        self.layers = [
            loaded_wrapper(
                experts,
                layer_idx=index,
                weight_path=f"model-{id(self)}",
                max_deferred_experts_per_token=max_deferred,
                **changes,
            )
            for index, experts in zip(layer_indices, self.experts, strict=True)
        ]

    def check_pass(self, seed, tokens, dtype=torch.float32, run=None):
        """One pass through all layers; each output is compared with the rule applied to its real input."""
        run = run or (lambda layer, *call: layer.forward(*call))
        waiting = torch.zeros(())
        numbers = [layer.layer_idx for layer in self.layers]
        for number, (layer, experts) in enumerate(zip(self.layers, self.experts, strict=True)):
            call = random_call(1000 * seed + number, tokens, dtype)
            now, later = slow_rule(call[1], call[2], TOP_K - self.max_deferred)
            if layer.layer_idx + 1 not in numbers:
                now, later = call[1], torch.full_like(now, -1)
            expected = reference(experts, call[0], now, call[2]) + waiting
            waiting = reference(experts, call[0], later, call[2])
            hidden = call[0].clone()
            output = run(layer, hidden, call[1].clone(), call[2].clone())
            hidden.fill_(float("nan"))  # the model goes on and reuses its memory
            assert_close(output, expected)
        assert not waiting.any()


@pytest.mark.parametrize("max_deferred", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_deferred_sums_arrive_at_the_next_moe_layer(max_deferred, tokens):
    model = Model([0, 1, 2, 3], max_deferred)
    for seed in range(3):
        model.check_pass(seed, tokens)


def test_a_layer_before_a_dense_one_defers_nothing():
    """What it deferred would wait through a layer that adds nothing."""
    model = Model([1, 3, 4, 9], 2)
    model.check_pass(0, 4)


def test_a_layer_before_one_without_cpu_experts_defers_nothing():
    model = Model([0, 1, 2], 2)
    call = random_call(1, 4, torch.float32)
    for has_cpu_experts, immediate in ((False, call[1]), (True, slow_rule(*call[1:], TOP_K - 2)[0])):
        model.layers[1].has_cpu_experts = has_cpu_experts
        expected = reference(model.experts[0], call[0], immediate, call[2])
        assert_close(model.layers[0].forward(*call), expected)
    model.layers[1].forward(*call)  # takes what layer 0 deferred
    assert model.layers[0]._chain.pending.layer_idx == 1


def test_a_mask_of_all_experts_leaves_none_to_the_cpu():
    model = Model([0, 1], 2)
    model.layers[1].gpu_experts_mask.fill_(True)
    call = random_call(1, 4, torch.float32)
    assert_close(model.layers[0].forward(*call), reference(model.experts[0], *call))


def test_a_layer_that_does_not_run_on_the_cpu_hands_out_what_waits_for_it():
    model = Model([0, 1, 2], 2)
    call = random_call(1, 4, torch.float32)
    model.layers[0].forward(*call)
    later = slow_rule(*call[1:], TOP_K - 2)[1]
    hidden = random_call(2, 4, torch.float32)[0]
    assert_close(model.layers[1].take_deferred(hidden), reference(model.experts[0], call[0], later, call[2]))
    assert model.layers[1].take_deferred(hidden) is None
    model.check_pass(0, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_that_a_call_names_are_skipped_but_ranked(dtype):
    model = Model([0, 1], 2)
    skip = {0, 1, 2}
    device_experts = torch.tensor([expert in skip for expert in range(EXPERTS)] + [False])
    call, following = random_call(5, 6, torch.float32), random_call(6, 6, torch.float32)
    call[1][0, 0] = -1
    now, later = slow_rule(call[1], call[2], 1)
    output = model.layers[0].forward(call[0], call[1].to(dtype), call[2], device_experts=device_experts)
    assert_close(output, reference(model.experts[0], call[0], now, call[2], skip))
    expected = reference(model.experts[0], call[0], later, call[2], skip)
    expected += reference(model.experts[1], *following)
    assert_close(model.layers[1].forward(*following), expected)


def test_an_impossible_id_is_reported_where_experts_are_named():
    model = Model([0], 0)
    hidden, ids, weights = random_call(5, 6, torch.float32)
    for impossible in (EXPERTS, EXPERTS + 1, -2):
        ids[2, 1] = impossible
        with pytest.raises(InputError, match=f"{impossible}"):
            model.layers[0].forward(
                hidden, ids, weights, device_experts=torch.zeros(EXPERTS + 1, dtype=torch.bool)
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype):
    Model([0, 1, 2], 2).check_pass(0, 5, dtype)


def test_submit_and_sync_defer_like_forward():
    def run(layer, hidden, ids, weights):
        layer.submit_forward(hidden, ids, weights)
        return layer.sync_forward(hidden)

    Model([0, 1, 2], 2).check_pass(0, 5, run=run)


def test_the_only_layer_of_a_model_defers_nothing():
    Model([5], 2).check_pass(0, 4)


def test_a_pass_that_was_given_up_does_not_leak_into_the_next(caplog):
    model = Model([0, 1, 2], 2)
    model.layers[0].forward(*random_call(1, 4, torch.float32))
    with caplog.at_level(logging.WARNING):
        model.check_pass(0, 4)
        model.check_pass(1, 7)
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1


def test_a_call_that_failed_does_not_leak_into_the_next():
    model = Model([0, 1, 2], 2)
    model.layers[0].forward(*random_call(1, 4, torch.float32))
    hidden, ids, weights = random_call(2, 4, torch.float32)
    ids[0, 0] = EXPERTS
    with pytest.raises(InputError, match="layer 1"):
        model.layers[1].forward(hidden, ids, weights)
    model.check_pass(0, 4)


def test_another_batch_in_the_middle_of_a_pass_is_refused():
    model = Model([0, 1, 2], 2)
    model.layers[0].forward(*random_call(1, 4, torch.float32))
    with pytest.raises(
        InputError, match=r"layer 1: the call has 5 tokens .* layer 0 deferred experts for 4 tokens"
    ):
        model.layers[1].forward(*random_call(2, 5, torch.float32))
    model.check_pass(0, 4)


def test_two_models_do_not_mix():
    first, second = Model([0, 1, 2], 2), Model([0, 1, 2], 1)
    assert first.layers[0].cpu_infer is second.layers[0].cpu_infer
    call = random_call(3, 4, torch.float32)
    first.layers[0].forward(*call)
    second.check_pass(0, 4)
    later = slow_rule(call[1], call[2], TOP_K - 2)[1]
    following = random_call(4, 4, torch.float32)
    expected = reference(
        first.experts[1], following[0], slow_rule(following[1], following[2], 1)[0], following[2]
    )
    expected += reference(first.experts[0], call[0], later, call[2])
    assert_close(first.layers[1].forward(*following), expected)


def test_experts_on_the_accelerator_are_skipped_in_both_parts():
    model = Model([0, 1], 2, num_gpu_experts=3)
    call, following = random_call(5, 6, torch.float32), random_call(6, 6, torch.float32)
    now, later = slow_rule(call[1], call[2], 1)
    skip = {0, 1, 2}
    output = model.layers[0].forward(*call)
    assert_close(output, reference(model.experts[0], call[0], now, call[2], skip))
    expected = reference(model.experts[0], call[0], later, call[2], skip)
    expected += reference(model.experts[1], *following, skip)
    assert_close(model.layers[1].forward(*following), expected)


def test_a_model_may_go_away_in_the_middle_of_a_pass():
    for seed in range(5):
        model = Model([0, 1], 2)
        model.layers[0].forward(*random_call(seed, 32))
        del model
    Model([0, 1], 2).check_pass(seed=0, tokens=5)
