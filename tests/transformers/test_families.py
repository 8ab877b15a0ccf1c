"""A patched model says what the model says: every family, experts on the CPU, on the device, on both."""

from __future__ import annotations

import pytest
from patched import agreement, load

# minimax_m2 is one of the families that are only served quantised; transformers runs it in any form.
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "minimax_m2")
# With other activations, biases, names in the configuration, kinds of attention.
OTHERS = (
    *("gpt_oss", "minimax_m3", "ernie4_5_moe", "hunyuan_v1_moe"),
    *("deepseek_v32", "deepseek_v4"),
)
SOME = 3


@pytest.mark.parametrize("device_experts", [0, SOME, "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_transformers(family, device_experts, tiny_checkpoint, tiny_reference):
    reference = tiny_reference(family)
    experts = reference.config.get_text_config()
    count = next(n for key in ("num_local_experts", "num_experts") if (n := getattr(experts, key, None)))
    wanted = count if device_experts == "all" else device_experts
    model = load(tiny_checkpoint(family), num_gpu_experts=wanted)
    result = agreement(model, reference)
    assert result.holds(), str(result)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_on_the_cpu(family, tiny_checkpoint, tiny_reference):
    result = agreement(load(tiny_checkpoint(family)), tiny_reference(family))
    assert result.holds(), str(result)
