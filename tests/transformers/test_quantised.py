"""Quantised checkpoints: experts in their own format, everything else decoded, as the model is meant."""

from __future__ import annotations

import pytest
from patched import agreement, load

# Each has dense layers that are quantised too, except kimi-k2-thinking.
LAYOUTS = ("deepseek-v3", "minimax-m2", "glm-4.7-fp8", "kimi-k2-thinking", "qwen3-gptq-int4", "qwen3-nvfp4")


@pytest.mark.parametrize("device_experts", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_logits_are_those_of_the_decoded_model(
    layout, device_experts, quantised_checkpoint, quantised_reference
):
    model = load(quantised_checkpoint(layout) / "served", num_gpu_experts=device_experts)
    result = agreement(model, quantised_reference(layout))
    assert result.holds(), str(result)


def test_experts_may_come_from_another_directory(quantised_checkpoint, quantised_reference):
    path = quantised_checkpoint("deepseek-v4-experts")
    model = load(path / "served", weight_path=path / "experts", num_gpu_experts=3)
    result = agreement(model, quantised_reference("deepseek-v4-experts"))
    assert result.holds(), str(result)
