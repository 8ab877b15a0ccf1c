"""Bytes of the KV cache follow from a configuration's kind of attention; a wrong kind is gigabytes off."""

from __future__ import annotations

import pytest

from kt_kernel.errors import ConfigurationError
from kt_kernel.planning.config_facts import sizes_of_config
from kt_kernel.planning.model_facts import GQA, LINEAR, MLA

COMMON = {
    "model_type": "m",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("changes", "attention", "values"),
    [
        ({}, GQA, 8 * 2 * 2 * 16),
        ({"head_dim": None}, GQA, 8 * 2 * 2 * 8),
        ({"num_key_value_heads": None}, GQA, 8 * 2 * 8 * 16),
        ({"full_attention_interval": 4}, LINEAR, 2 * 2 * 2 * 16),
        ({"layer_types": ["linear_attention"] * 6 + ["full_attention"] * 2}, LINEAR, 2 * 2 * 2 * 16),
        ({"layer_types": ["sliding_attention", "full_attention"] * 4}, GQA, 8 * 2 * 2 * 16),
        ({"kv_lora_rank": 32, "qk_rope_head_dim": 8}, MLA, 8 * 40),
        ({"kv_lora_rank": 32, "qk_rope_head_dim": 8, "index_head_dim": 16}, MLA, 8 * (40 + 8 + 2)),
        (
            {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "linear_attn_config": {"full_attn_layers": [4, 8]}},
            MLA,
            2 * 40,
        ),
    ],
)
def test_kv_cache_of_each_kind_of_attention(changes, attention, values):
    sizes = sizes_of_config({**COMMON, **changes})
    assert (sizes.attention, sizes.kv_values_per_token) == (attention, values)


def test_language_model_of_a_multimodal_one_counts():
    sizes = sizes_of_config({"model_type": "outer", "architectures": ["A"], "text_config": COMMON})
    assert (sizes.family, sizes.architecture, sizes.experts) == ("outer", "A", 4)


def test_layers_before_the_first_with_experts_hold_none():
    ernie = {key: value for key, value in COMMON.items() if key != "num_experts"}
    ernie |= {"moe_num_experts": 4, "moe_layer_start_index": 3, "moe_k": 2}
    assert sizes_of_config(ernie).moe_layers == 5
    assert sizes_of_config({**COMMON, "first_k_dense_replace": 1}).moe_layers == 7


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts", "num_attention_heads"])
def test_configuration_that_says_too_little_is_refused(key):
    said = {name: value for name, value in COMMON.items() if name != key}
    with pytest.raises(ConfigurationError):
        sizes_of_config(said)
