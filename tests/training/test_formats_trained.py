"""The formats that `load` makes of stored experts: near the stored ones, and they learn."""

from __future__ import annotations

import pytest
import torch
from training_runs import adamw, batches, train, trainable

from kt_kernel.errors import ConfigurationError
from kt_kernel.training.weights import AS_STORED, method_of


@pytest.mark.parametrize(("experts", "most"), [("bf16", 0.0), ("int8", 0.02), ("int4", 0.2)])
def test_experts_are_quantised_anew_and_learn(tiny, experts, most):
    stored, made = trainable(tiny()), trainable(tiny(), experts=experts)
    layers = [model.base_model.model.model.layers[0].mlp.experts for model in (stored, made)]
    before, after = (layer.base_layer.weights.expert(3).gate for layer in layers)
    assert (after - before).norm() <= most * before.norm()
    losses = train(made, batches(3) * 4, adamw(made))
    assert losses[-1] < losses[0]


def test_names_of_formats_are_methods():
    assert method_of(AS_STORED, "FP8") == "FP8"
    assert method_of("bf16", "FP8") == "BF16" and method_of("int8", "MOE_INT8") == "MOE_INT8"
    with pytest.raises(ConfigurationError, match="experts is 'int3'"):
        method_of("int3", "BF16")


def test_gradients_reach_hidden_states_and_the_router(tiny):
    """With LoRA on the router's input path alone, gradients come through the frozen experts."""
    model = trainable(tiny())
    experts = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, requires_grad=True)
    weights = torch.rand(5, 2, requires_grad=True)
    experts(x, torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]]), weights).sum().backward()
    assert x.grad.abs().sum() > 0 and weights.grad.abs().min() > 0
