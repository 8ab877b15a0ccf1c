"""Every way to place and move experts gives the model's answer: strategies x slots x deferral x prefill x
updates, on a small model of four MoE layers, against the same model in float64.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hybrid_models import (
    ANSWER,
    DECODER_LAYERS,
    EXPERTS,
    MOE_LAYERS,
    PROMPT,
    Answer,
    Engine,
    Reference,
    answer,
    assert_close,
    prompt,
)

from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.placement import device_expert_masks

STRATEGIES = ("uniform", "frequency", "front-loading", "random")
UPDATES = {"fixed": {}, "updated": {"update_after_prefill": True, "update_interval": 2}}
SEED = 3


def _masks(strategy: str, per_layer: int) -> torch.Tensor:
    counts = torch.rand(DECODER_LAYERS, EXPERTS, generator=torch.Generator().manual_seed(5)).double()
    total = per_layer * len(MOE_LAYERS)
    return device_expert_masks(strategy, DECODER_LAYERS, MOE_LAYERS, EXPERTS, total, counts=counts)


@cache
def _all_torch() -> Answer:
    """The answer of the model without an engine and without deferral."""
    result = answer(Reference().decoder(), prompt(SEED), ANSWER, lambda: None)
    assert result.margin > 0.1, "choose a seed whose tokens are clear"
    return result


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("threshold", [0, PROMPT - 1, PROMPT, PROMPT + 1])
@pytest.mark.parametrize("max_deferred", [0, 1, 2])
@pytest.mark.parametrize("per_layer", [0, 1, 3, EXPERTS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_combination(strategy, per_layer, max_deferred, threshold, update):
    """The CPU runs the same experts in the same tasks, and all sums agree; tokens too if none is deferred."""
    reference = Reference(max_deferred, threshold)
    options = HybridOptions(prefill_threshold=threshold, **UPDATES[update])
    expected_answer = _all_torch()
    chunks = [prompt(SEED), *torch.tensor(expected_answer.tokens[:-1]).split(1)]
    with Engine(_masks(strategy, per_layer), options, max_deferred) as engine:
        decoder, expected_decoder = engine.decoder(), reference.decoder()
        for number, chunk in enumerate(chunks):
            engine.model.begin_step()
            reference.on_device = engine.placements()
            logits, expected = decoder.forward(chunk), expected_decoder.forward(chunk)
            assert engine.cpu_runs == reference.cpu_runs, f"pass {number}"
            assert_close(logits, expected, f"pass {number}")
            if not max_deferred:
                assert int(logits[-1].argmax()) == expected_answer.tokens[number]
        prefilled = 0 < threshold <= PROMPT and per_layer < EXPERTS
        figures = engine.model.report()
        assert figures["prefill"]["chunks"] == (1 if prefilled else 0)
        assert figures["prefill"]["fallbacks"] == 0
        assert figures["device_experts"] <= per_layer * len(MOE_LAYERS)
        assert figures["deferred"] == max_deferred
